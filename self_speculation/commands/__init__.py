"""The six programs: flags, one call, one report each."""
