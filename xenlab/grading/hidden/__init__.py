"""What graders know and students do not: further guests, and the classes of instructions.

`xenlab release` leaves this folder out of the students' archive.
"""
