"""The subcommands that talk to the engine, a family in each module."""
