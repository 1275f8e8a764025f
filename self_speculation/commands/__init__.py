"""The programs: flags, known without torch, and a file each for the work that they ask for."""
