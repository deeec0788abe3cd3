"""Everything around a network: tasks, files, settings, data, pages and commands."""
