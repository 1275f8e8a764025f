"""The programs: flags, one call, one report each."""
