"""Running a recipe: its tokenizer, its data, its stages one after the other, its report."""
