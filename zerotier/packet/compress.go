package packet

import (
	"errors"

	"github.com/pierrec/lz4/v4"
)

// ErrCompression says that a compressed payload is malformed or too long.
var ErrCompression = errors.New("malformed compressed payload")

const (
	compressFrom = 65 // payload bytes; shorter ones do not gain (chapter 01 §4.7)
	minMatch     = 4
	lastLiterals = 5 // a block ends in at least so many literals
)

// Compress returns p with an LZ4 payload, built in dst, if that is shorter. dst
// needs the capacity of p and must not overlap it.
func Compress(p Packet, dst []byte) (Packet, bool) {
	if len(p) < HeaderLen+compressFrom || p.Compressed() || cap(dst) < len(p) {
		return p, false
	}
	dst = dst[:len(p)]
	n, err := lz4.CompressBlock(p[HeaderLen:], dst[HeaderLen:len(p)-1], nil)
	if err != nil || n == 0 {
		return p, false
	}
	copy(dst, p[:HeaderLen])
	dst[offVerb] |= flagCompressed
	return Packet(dst[:HeaderLen+n]), true
}

// Decompress returns p with its payload in the clear, built in dst if it was
// compressed. dst needs a capacity of [MaxPacket].
func Decompress(p Packet, dst []byte) (Packet, error) {
	if !p.Compressed() {
		return p, nil
	}
	if len(p) == HeaderLen {
		p[offVerb] &^= flagCompressed
		return p, nil
	}
	dst = append(dst[:0], p[:HeaderLen]...)
	dst[offVerb] &^= flagCompressed
	out, err := decodeBlock(dst, p[HeaderLen:])
	if err != nil {
		return nil, err
	}
	return Packet(out), nil
}

// decodeBlock appends the content of a raw LZ4 block to dst, whose first
// HeaderLen bytes are not part of it, up to MaxPacket bytes in all.
func decodeBlock(dst, src []byte) ([]byte, error) {
	for len(src) > 0 {
		token := src[0]
		src = src[1:]
		literals, rest, ok := lz4Length(int(token>>4), src)
		if !ok || literals > len(rest) || len(dst)+literals > MaxPacket {
			return nil, ErrCompression
		}
		dst = append(dst, rest[:literals]...)
		src = rest[literals:]
		if len(src) == 0 {
			if len(dst) == HeaderLen || literals < min(lastLiterals, len(dst)-HeaderLen) {
				return nil, ErrCompression
			}
			return dst, nil
		}
		if len(src) < 2 {
			return nil, ErrCompression
		}
		offset := int(src[0]) | int(src[1])<<8
		length, rest, ok := lz4Length(int(token&15), src[2:])
		length += minMatch
		if !ok || offset == 0 || offset > len(dst)-HeaderLen || len(dst)+length > MaxPacket {
			return nil, ErrCompression
		}
		src = rest
		for from := len(dst) - offset; length > 0; {
			n := min(length, len(dst)-from) // an overlapping match repeats what it wrote
			dst = append(dst, dst[from:from+n]...)
			length -= n
		}
	}
	return nil, ErrCompression // ended with a match
}

// lz4Length reads the bytes that extend a length nibble.
func lz4Length(n int, src []byte) (int, []byte, bool) {
	if n < 15 {
		return n, src, true
	}
	for i, b := range src {
		if n += int(b); n > MaxPacket {
			return 0, nil, false
		}
		if b != 255 {
			return n, src[i+1:], true
		}
	}
	return 0, nil, false
}
