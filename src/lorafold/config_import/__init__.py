"""Import of other tools' training configurations as recipes, with a report on every key."""
