"""Other tools' training configurations as recipes, with a report on every field."""
