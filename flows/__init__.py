"""What runs, when, and whether it must: recipes, plan, engine, store, command line, Prefect flow."""
