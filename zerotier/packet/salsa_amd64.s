//go:build !purego

#include "textflag.h"

// Counter offsets: word 0 of the third diagonal, one block per 128-bit lane.
DATA salsaLanes<>+0(SB)/8, $0
DATA salsaLanes<>+8(SB)/8, $0
DATA salsaLanes<>+16(SB)/8, $1
DATA salsaLanes<>+24(SB)/8, $0
GLOBL salsaLanes<>(SB), RODATA|NOPTR, $32

DATA salsaTwo<>+0(SB)/8, $2
DATA salsaTwo<>+8(SB)/8, $0
DATA salsaTwo<>+16(SB)/8, $2
DATA salsaTwo<>+24(SB)/8, $0
GLOBL salsaTwo<>(SB), RODATA|NOPTR, $32

DATA salsaFour<>+0(SB)/8, $4
DATA salsaFour<>+8(SB)/8, $0
DATA salsaFour<>+16(SB)/8, $4
DATA salsaFour<>+24(SB)/8, $0
GLOBL salsaFour<>(SB), RODATA|NOPTR, $32

// STEP does dst ^= rotl(x + y, n) for two pairs of blocks; m is 32 - n.
#define STEP(x0, y0, dst0, x1, y1, dst1, n, m) \
	VPADDD x0, y0, Y8     \
	VPADDD x1, y1, Y10    \
	VPSLLD n, Y8, Y9      \
	VPSLLD n, Y10, Y11    \
	VPSRLD m, Y8, Y8      \
	VPSRLD m, Y10, Y10    \
	VPXOR  Y9, dst0, dst0 \
	VPXOR  Y11, dst1, dst1 \
	VPXOR  Y8, dst0, dst0 \
	VPXOR  Y10, dst1, dst1

// OUTPUT turns diagonals into rows, rows into blocks, and applies them.
#define OUTPUT(a, b, c, d, off) \
	VPBLENDD   $0xaa, d, a, Y8    \
	VPBLENDD   $0xaa, a, d, Y9    \
	VPBLENDD   $0xaa, b, c, Y10   \
	VPBLENDD   $0xaa, c, b, Y11   \
	VPBLENDD   $0xcc, Y10, Y8, a  \
	VPBLENDD   $0xcc, Y8, Y10, c  \
	VPBLENDD   $0x66, Y9, Y11, b  \
	VPBLENDD   $0x66, Y11, Y9, d  \
	VPERM2I128 $0x20, b, a, Y8    \
	VPERM2I128 $0x20, d, c, Y9    \
	VPERM2I128 $0x31, b, a, Y10   \
	VPERM2I128 $0x31, d, c, Y11   \
	VPXOR      (off+0)(DX), Y8, Y8    \
	VPXOR      (off+32)(DX), Y9, Y9   \
	VPXOR      (off+64)(DX), Y10, Y10 \
	VPXOR      (off+96)(DX), Y11, Y11 \
	VMOVDQU    Y8, (off+0)(DX)    \
	VMOVDQU    Y9, (off+32)(DX)   \
	VMOVDQU    Y10, (off+64)(DX)  \
	VMOVDQU    Y11, (off+96)(DX)

// func salsa12XORAVX2(diagonals *[16]uint32, b *byte, n int)
TEXT ·salsa12XORAVX2(SB), NOSPLIT, $0-24
	MOVQ diagonals+0(FP), AX
	MOVQ b+8(FP), DX
	MOVQ n+16(FP), CX

	VBROADCASTI128 0(AX), Y12
	VBROADCASTI128 16(AX), Y13
	VBROADCASTI128 32(AX), Y14
	VBROADCASTI128 48(AX), Y15
	VPADDD         salsaLanes<>(SB), Y14, Y14

salsaLoop:
	VMOVDQA Y12, Y0
	VMOVDQA Y13, Y1
	VMOVDQA Y14, Y2
	VMOVDQA Y15, Y3
	VMOVDQA Y12, Y4
	VMOVDQA Y13, Y5
	VPADDD  salsaTwo<>(SB), Y14, Y6
	VMOVDQA Y15, Y7
	MOVQ    $6, R8

salsaRounds:
	// columns
	STEP(Y0, Y3, Y1, Y4, Y7, Y5, $7, $25)
	STEP(Y1, Y0, Y2, Y5, Y4, Y6, $9, $23)
	STEP(Y2, Y1, Y3, Y6, Y5, Y7, $13, $19)
	STEP(Y3, Y2, Y0, Y7, Y6, Y4, $18, $14)
	VPSHUFD $0x93, Y1, Y1
	VPSHUFD $0x93, Y5, Y5
	VPSHUFD $0x4e, Y2, Y2
	VPSHUFD $0x4e, Y6, Y6
	VPSHUFD $0x39, Y3, Y3
	VPSHUFD $0x39, Y7, Y7

	// rows: second and fourth diagonal change places
	STEP(Y0, Y1, Y3, Y4, Y5, Y7, $7, $25)
	STEP(Y3, Y0, Y2, Y7, Y4, Y6, $9, $23)
	STEP(Y2, Y3, Y1, Y6, Y7, Y5, $13, $19)
	STEP(Y1, Y2, Y0, Y5, Y6, Y4, $18, $14)
	VPSHUFD $0x39, Y1, Y1
	VPSHUFD $0x39, Y5, Y5
	VPSHUFD $0x4e, Y2, Y2
	VPSHUFD $0x4e, Y6, Y6
	VPSHUFD $0x93, Y3, Y3
	VPSHUFD $0x93, Y7, Y7

	DECQ R8
	JNZ  salsaRounds

	VPADDD Y12, Y0, Y0
	VPADDD Y13, Y1, Y1
	VPADDD Y14, Y2, Y2
	VPADDD Y15, Y3, Y3
	VPADDD salsaTwo<>(SB), Y14, Y8
	VPADDD Y12, Y4, Y4
	VPADDD Y13, Y5, Y5
	VPADDD Y8, Y6, Y6
	VPADDD Y15, Y7, Y7
	OUTPUT(Y0, Y1, Y2, Y3, 0)
	OUTPUT(Y4, Y5, Y6, Y7, 128)

	VPADDD salsaFour<>(SB), Y14, Y14
	ADDQ   $256, DX
	SUBQ   $256, CX
	JNZ    salsaLoop

	VZEROUPPER
	RET
