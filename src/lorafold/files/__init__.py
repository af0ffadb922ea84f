"""Files and directories of ours: written whole or not at all, recorded, verified, shown."""
