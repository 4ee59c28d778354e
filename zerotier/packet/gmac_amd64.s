//go:build !purego

#include "textflag.h"

// Reverses the bytes of a block.
DATA ghashReverse<>+0(SB)/8, $0x08090a0b0c0d0e0f
DATA ghashReverse<>+8(SB)/8, $0x0001020304050607
GLOBL ghashReverse<>(SB), RODATA|NOPTR, $16

// The reduction polynomial, reflected.
DATA ghashPoly<>+0(SB)/8, $1
DATA ghashPoly<>+8(SB)/8, $0xc200000000000000
GLOBL ghashPoly<>(SB), RODATA|NOPTR, $16

// LOAD reads two blocks.
#define LOAD(off, y) \
	VMOVDQU off(DX), y \
	VPSHUFB Y10, y, y

// MULADD adds the unreduced products of two blocks with their keys.
#define MULADD(y, key) \
	VPCLMULQDQ $0x00, key, y, Y7 \
	VPCLMULQDQ $0x11, key, y, Y8 \
	VPXOR      Y7, Y4, Y4        \
	VPXOR      Y8, Y6, Y6        \
	VPCLMULQDQ $0x01, key, y, Y7 \
	VPCLMULQDQ $0x10, key, y, Y8 \
	VPXOR      Y7, Y5, Y5        \
	VPXOR      Y8, Y5, Y5

// func ghashVPCLMUL(keys *[128]byte, y *[16]byte, b *byte, n int)
TEXT ·ghashVPCLMUL(SB), NOSPLIT, $0-32
	MOVQ keys+0(FP), AX
	MOVQ y+8(FP), BX
	MOVQ b+16(FP), DX
	MOVQ n+24(FP), CX

	VBROADCASTI128 ghashReverse<>(SB), Y10
	VBROADCASTI128 ghashPoly<>(SB), Y15
	VMOVDQU        0(AX), Y11
	VMOVDQU        32(AX), Y12
	VMOVDQU        64(AX), Y13
	VMOVDQU        96(AX), Y14
	VMOVDQU        (BX), X9
	VPSHUFB        X10, X9, X9

ghashLoop:
	LOAD(0, Y0)
	LOAD(32, Y1)
	LOAD(64, Y2)
	LOAD(96, Y3)
	VPXOR Y9, Y0, Y0

	VPCLMULQDQ $0x00, Y12, Y1, Y4
	VPCLMULQDQ $0x11, Y12, Y1, Y6
	VPCLMULQDQ $0x01, Y12, Y1, Y5
	VPCLMULQDQ $0x10, Y12, Y1, Y7
	VPXOR      Y7, Y5, Y5
	MULADD(Y2, Y13)
	MULADD(Y3, Y14)
	MULADD(Y0, Y11)

	VPCLMULQDQ $0x01, Y4, Y15, Y7
	VPSHUFD    $0x4e, Y4, Y4
	VPXOR      Y4, Y5, Y5
	VPXOR      Y7, Y5, Y5
	VPCLMULQDQ $0x01, Y5, Y15, Y7
	VPSHUFD    $0x4e, Y5, Y5
	VPXOR      Y5, Y6, Y6
	VPXOR      Y7, Y6, Y6

	VEXTRACTI128 $1, Y6, X7
	VPXOR        X7, X6, X9
	ADDQ         $128, DX
	SUBQ         $128, CX
	JNZ          ghashLoop

	VPSHUFB X10, X9, X9
	VMOVDQU X9, (BX)
	VZEROUPPER
	RET
