"""What runs, when, and whether it must: recipes, plan, engine, store, commands, Prefect flow."""
