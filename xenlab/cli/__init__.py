"""The command line: lab, check, boot, bench, grade, release, doctor."""
