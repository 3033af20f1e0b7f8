#!/bin/bash
# mk.sh [OUT] - builds the PVH test payload: 32-bit code in a 64-bit ELF (the rust-vmm loader takes no
# 32-bit ELF). Needs gcc and binutils for x86, no 32-bit libraries.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
OUT=$(realpath -m "${1:-nano.elf}")
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
cd "$T"

gcc -m32 -ffreestanding -fno-pic -fno-pie -fno-stack-protector -fno-asynchronous-unwind-tables \
    -mno-sse -mno-mmx -O1 -Wall -Wextra -c "$HERE/nano.c" -o nano.o
cat >flat.ld <<'E2'
SECTIONS {
    . = 0x200000;
    .all : { *(.text.start) *(.text*) *(.rodata*) *(.data*) *(.bss*) *(COMMON) }
    /DISCARD/ : { *(.note*) *(.comment) *(.eh_frame) }
}
E2
ld --no-warn-rwx-segments -m elf_i386 -T flat.ld -e start nano.o -o nano32
objcopy -O binary --set-section-flags .all=alloc,load,contents nano32 nano.bin

# the note tells the loader the 32-bit entry point (XEN_ELFNOTE_PHYS32_ENTRY = 18)
cat >wrap.S <<'E2'
.section .image,"awx",@progbits
.globl _start
_start: .incbin "nano.bin"
.section .note.Xen,"a",@note
.long 4, 8, 18
.asciz "Xen"
.quad 0x200000
E2
gcc -c wrap.S -o wrap.o
cat >wrap.ld <<'E2'
PHDRS { load PT_LOAD FLAGS(7); note PT_NOTE; }
SECTIONS {
    . = 0x200000;
    .image : { *(.image) } :load
    .note.Xen : { *(.note.Xen) } :load :note
    /DISCARD/ : { *(*) }
}
E2
ld --no-warn-rwx-segments -m elf_x86_64 -T wrap.ld -e _start wrap.o -o "$OUT"
