"""Words that models read: templates, scene attributes, instructions, the shipped prompt bank."""
