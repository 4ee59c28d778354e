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

// MULADDZ adds the unreduced products of four blocks with their keys.
#define MULADDZ(y, key) \
	VPCLMULQDQ $0x00, key, y, Z7    \
	VPCLMULQDQ $0x11, key, y, Z8    \
	VPCLMULQDQ $0x01, key, y, Z16   \
	VPCLMULQDQ $0x10, key, y, Z17   \
	VPXORQ     Z7, Z4, Z4           \
	VPXORQ     Z8, Z6, Z6           \
	VPTERNLOGQ $0x96, Z16, Z17, Z5

// LOADZ reads four blocks.
#define LOADZ(off, y) \
	VMOVDQU64 off(DX), y \
	VPSHUFB   Z10, y, y

// REDUCEZ leaves the sum of all products in Z9, the other lanes of which are zero.
#define REDUCEZ \
	VPCLMULQDQ    $0x01, Z4, Z15, Z7 \
	VPSHUFD       $0x4e, Z4, Z4      \
	VPTERNLOGQ    $0x96, Z4, Z7, Z5  \
	VPCLMULQDQ    $0x01, Z5, Z15, Z7 \
	VPSHUFD       $0x4e, Z5, Z5      \
	VPTERNLOGQ    $0x96, Z5, Z7, Z6  \
	VEXTRACTI64X4 $1, Z6, Y7         \
	VPXOR         Y7, Y6, Y6         \
	VEXTRACTI128  $1, Y6, X7         \
	VPXOR         X7, X6, X9

// func ghashAVX512(keys *[336]byte, tag *[16]byte, b *byte, n int)
TEXT ·ghashAVX512(SB), NOSPLIT, $0-32
	MOVQ keys+0(FP), AX
	MOVQ tag+8(FP), BX
	MOVQ b+16(FP), DX
	MOVQ n+24(FP), CX
	LEAQ (CX*8), R9 // the length block

	VBROADCASTI32X4 ghashReverse<>(SB), Z10
	VBROADCASTI32X4 ghashPoly<>(SB), Z15
	VPXORQ          Z9, Z9, Z9
	CMPQ            CX, $256
	JB              rest

	VMOVDQU64 16(AX), Z11 // after H^17
	VMOVDQU64 80(AX), Z12
	VMOVDQU64 144(AX), Z13
	VMOVDQU64 208(AX), Z14

wide:
	LOADZ(0, Z0)
	LOADZ(64, Z1)
	LOADZ(128, Z2)
	LOADZ(192, Z3)
	VPXORQ     Z9, Z0, Z0
	VPCLMULQDQ $0x00, Z12, Z1, Z4
	VPCLMULQDQ $0x11, Z12, Z1, Z6
	VPCLMULQDQ $0x01, Z12, Z1, Z5
	VPCLMULQDQ $0x10, Z12, Z1, Z7
	VPXORQ     Z7, Z5, Z5
	MULADDZ(Z2, Z13)
	MULADDZ(Z3, Z14)
	MULADDZ(Z0, Z11)
	REDUCEZ
	ADDQ       $256, DX
	SUBQ       $256, CX
	CMPQ       CX, $256
	JAE        wide

rest:
	// The length block times H, to which the sum belongs if no data is left.
	VMOVQ   R9, X0
	VPSLLDQ $8, X0, X0
	TESTQ   CX, CX
	JNZ     last
	VPXOR   X9, X0, X0

last:
	VMOVDQU    256(AX), X11
	VPCLMULQDQ $0x00, X11, X0, X4
	VPCLMULQDQ $0x11, X11, X0, X6
	VPCLMULQDQ $0x01, X11, X0, X5
	VPCLMULQDQ $0x10, X11, X0, X7
	VPXOR      X7, X5, X5
	TESTQ      CX, CX
	JZ         reduce

	// The first of n blocks left times H^(n+1), and so on.
	LEAQ 15(CX), R8
	ANDQ $~15, R8
	SUBQ R8, AX
	ADDQ $256, AX

part:
	MOVQ        $-1, R8
	BZHIQ       CX, R8, R8
	KMOVQ       R8, K1
	VMOVDQU8.Z  (DX), K1, Z0
	VPSHUFB     Z10, Z0, Z0
	VPXORQ      Z9, Z0, Z0
	VPXORQ      Z9, Z9, Z9
	VMOVDQU64   (AX), Z11
	MULADDZ(Z0, Z11)
	ADDQ        $64, DX
	ADDQ        $64, AX
	SUBQ        $64, CX
	JG          part

reduce:
	REDUCEZ
	VPSHUFB X10, X9, X9
	VPXOR   (BX), X9, X9
	VMOVDQU X9, (BX)
	VZEROUPPER
	RET
