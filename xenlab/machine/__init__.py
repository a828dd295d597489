"""The hardware: CPU, memory, paging, segments, assembler, disassembler."""
