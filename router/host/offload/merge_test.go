package offload

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"
)

// flowFrame returns one complete segment of a flow that its port tells apart.
func flowFrame(v6 bool, port uint16, seq uint32, flags byte, payload []byte) []byte {
	f, tcp := tcpFrame(v6, payload)
	binary.BigEndian.PutUint16(f[tcp:], port)
	binary.BigEndian.PutUint32(f[tcp+4:], seq)
	f[tcp+13] = flags
	f[tcp+16], f[tcp+17] = 0, 0
	addresses := f[26:34]
	if v6 {
		addresses = f[22:54]
	} else {
		putSum(f[24:], fold(sum(f[14:34], 0)))
	}
	putSum(f[tcp+16:], fold(sum(f[tcp:], sum(addresses, word(6+len(f)-tcp)))))
	return f
}

// merge runs frames through a merger and returns what it wrote, in the form that
// the kernel sees, and the same cut into frames again.
func merge(t *testing.T, frames [][]byte) (written, cutAgain [][]byte) {
	t.Helper()
	m := Merger{Link: EthernetLen, UDP: true, Write: func(parts [][]byte) { written = append(written, bytes.Join(parts, nil)) }}
	for _, f := range frames {
		m.Add(slices.Clone(f))
	}
	m.Flush()
	for _, b := range written {
		got, err := cut(b)
		if err != nil {
			t.Fatalf("written frame can't be cut: %v", err)
		}
		cutAgain = append(cutAgain, got...)
	}
	return written, cutAgain
}

func TestMergeRoundTrip(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		var frames [][]byte
		for i := range 40 { // two flows that alternate
			for port := range uint16(2) {
				payload := bytes.Repeat([]byte{byte(i), byte(port)}, 500)
				f := flowFrame(v6, port, uint32(i*1000), 0x10, payload)
				if !v6 { // IP IDs count up, as segmentation makes them
					binary.BigEndian.PutUint16(f[18:], uint16(i))
					f[24], f[25] = 0, 0
					putSum(f[24:], fold(sum(f[14:34], 0)))
				}
				frames = append(frames, f)
			}
		}
		written, got := merge(t, frames)
		if len(written) != 2 {
			t.Errorf("v6 %v: %d frames written, want 2", v6, len(written))
		}
		if len(got) != len(frames) {
			t.Fatalf("v6 %v: %d frames after cutting, want %d", v6, len(got), len(frames))
		}
		for _, f := range frames {
			if !slices.ContainsFunc(got, func(g []byte) bool { return bytes.Equal(f, g) }) {
				t.Fatalf("v6 %v: a frame was changed", v6)
			}
		}
	}
}

// datagram returns a complete UDP datagram in a frame.
func datagram(v6 bool, port uint16, id int, payload []byte) []byte {
	l4 := 34
	if v6 {
		l4 = 54
	}
	f := make([]byte, l4+udpLen+len(payload))
	copy(f[l4+udpLen:], payload)
	p := packet{b: f, ip: EthernetLen, l4: l4, head: l4 + udpLen, protocol: 17}
	if v6 {
		f[12], f[13] = 0x86, 0xdd
		f[14], f[20], f[21], f[37], f[53] = 0x60, 17, 64, 1, 2
	} else {
		f[12], f[13], f[14], f[22], f[23] = 8, 0, 0x45, 64, 17
		binary.BigEndian.PutUint16(f[18:], uint16(id))
		copy(f[26:], []byte{10, 0, 0, 1, 10, 0, 0, 2})
	}
	binary.BigEndian.PutUint16(f[l4:], port)
	p.setLength(len(f) - EthernetLen)
	putSum(p.checksum(), fold(sum(f[l4:], p.pseudo(len(f)-l4))))
	return f
}

func TestMergeDatagrams(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		var frames [][]byte
		for i := range 100 {
			for port := range uint16(2) {
				frames = append(frames, datagram(v6, port, i%MaxParts, bytes.Repeat([]byte{byte(i), byte(port)}, 300)))
			}
		}
		written, got := merge(t, frames)
		if want := 4; len(written) != want { // 64 and 36 of each
			t.Errorf("v6 %v: %d packets written, want %d", v6, len(written), want)
		}
		if len(got) != len(frames) {
			t.Fatalf("v6 %v: %d datagrams after cutting, want %d", v6, len(got), len(frames))
		}
		for i, f := range frames {
			if !slices.ContainsFunc(got, func(g []byte) bool { return bytes.Equal(f, g) }) {
				t.Fatalf("v6 %v: datagram %d was changed", v6, i)
			}
		}
	}
	short, none := datagram(false, 1, 1, make([]byte, 10)), datagram(false, 1, 1, make([]byte, 600))
	none[40], none[41] = 0, 0 // no checksum
	broken := datagram(false, 1, 1, make([]byte, 600))
	broken[60] ^= 1
	whole := datagram(false, 1, 0, make([]byte, 600))
	for name, c := range map[string]struct {
		frames [][]byte
		want   int
	}{
		"short last":   {[][]byte{whole, short}, 1},
		"behind short": {[][]byte{whole, short, short}, 2},
		"longer":       {[][]byte{short, whole}, 2},
		"no checksum":  {[][]byte{whole, none, whole}, 3},
		"wrong":        {[][]byte{whole, broken, whole}, 3},
	} {
		var written [][]byte
		m := Merger{Link: EthernetLen, UDP: true, Write: func(parts [][]byte) { written = append(written, bytes.Join(parts, nil)) }}
		for _, f := range c.frames {
			m.Add(slices.Clone(f))
		}
		m.Flush()
		if len(written) != c.want {
			t.Errorf("%s: %d packets written, want %d", name, len(written), c.want)
		}
	}
	plain := 0
	m := Merger{Link: EthernetLen, Write: func([][]byte) { plain++ }}
	m.Add(whole)
	m.Add(whole)
	m.Flush()
	if plain != 2 {
		t.Errorf("%d packets for a kernel that takes no merged datagrams, want 2", plain)
	}
}

func TestSum(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for n := range 300 {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		want := uint32(17) // added as a number
		for i := range b {
			want += uint32(b[i]) << (8 * (1 - i&1))
		}
		for want > 0xffff {
			want = want>>16 + want&0xffff
		}
		var got [2]byte
		binary.NativeEndian.PutUint16(got[:], ^fold(sum(b, word(17))))
		if g := binary.BigEndian.Uint16(got[:]); g != uint16(want) {
			t.Fatalf("%d bytes: %#x, want %#x", n, g, want)
		}
	}
}

// What differs in more than its payload stays as it is, and the order of a flow
// is kept.
func TestMergeStops(t *testing.T) {
	data := make([]byte, 1000)
	next := func(seq uint32, flags byte, n int) []byte { return flowFrame(false, 1, seq, flags, data[:n]) }
	broken := next(1000, 0x10, 1000)
	broken[len(broken)-1] ^= 1
	window := next(1000, 0x10, 1000)
	for _, c := range []struct {
		name   string
		frames [][]byte
		want   int // frames written
	}{
		{"two in a row", [][]byte{next(0, 0x10, 1000), next(1000, 0x10, 1000)}, 1},
		{"short last", [][]byte{next(0, 0x10, 1000), next(1000, 0x10, 10)}, 1},
		{"after a short one", [][]byte{next(0, 0x10, 1000), next(1000, 0x10, 10), next(1010, 0x10, 10)}, 2},
		{"push ends", [][]byte{next(0, 0x10, 1000), next(1000, 0x18, 1000), next(2000, 0x10, 1000)}, 2},
		{"gap", [][]byte{next(0, 0x10, 1000), next(2000, 0x10, 1000)}, 2},
		{"longer", [][]byte{next(0, 0x10, 500), next(500, 0x10, 1000)}, 2},
		{"FIN", [][]byte{next(0, 0x10, 1000), next(1000, 0x11, 1000)}, 2},
		{"bare acknowledgement between", [][]byte{next(0, 0x10, 1000), next(1000, 0x10, 0), next(1000, 0x10, 1000)}, 3},
		{"wrong checksum", [][]byte{next(0, 0x10, 1000), broken}, 2},
		{"64 KiB", func() (out [][]byte) {
			for i := range uint32(66) {
				out = append(out, next(i*1000, 0x10, 1000))
			}
			return out
		}(), 2},
		{"no TCP", [][]byte{make([]byte, 60), make([]byte, 10), nil}, 3},
		{"window", [][]byte{next(0, 0x10, 1000), func() []byte {
			tcp := 34
			binary.BigEndian.PutUint16(window[tcp+14:], 77)
			window[tcp+16], window[tcp+17] = 0, 0
			putSum(window[tcp+16:], fold(sum(window[tcp:], sum(window[26:34], word(6+len(window)-tcp)))))
			return window
		}()}, 2},
	} {
		var written [][]byte
		m := Merger{Link: EthernetLen, UDP: true, Write: func(parts [][]byte) { written = append(written, bytes.Join(parts, nil)) }}
		for _, f := range c.frames {
			m.Add(slices.Clone(f))
		}
		m.Flush()
		if len(written) != c.want {
			t.Errorf("%s: %d frames written, want %d", c.name, len(written), c.want)
		}
		last := uint32(0)
		for _, w := range written {
			if tcp := HeaderLen + 34; len(w) > tcp+8 {
				seq := binary.BigEndian.Uint32(w[tcp+4:])
				if seq < last {
					t.Errorf("%s: the order changed", c.name)
				}
				last = seq
			}
		}
	}
}

// Any mix of frames comes out complete: as many bytes of payload as went in.
func FuzzMerge(f *testing.F) {
	f.Add(uint64(1), []byte{0, 0, 1, 2, 3})
	f.Add(uint64(7), []byte{4, 4, 4, 250, 4})
	f.Add(uint64(9), []byte{16, 16, 17, 16, 20, 20})
	f.Fuzz(func(t *testing.T, seed uint64, ops []byte) {
		r := rand.New(rand.NewPCG(seed, 0))
		var frames [][]byte
		seqs := map[uint16]uint32{}
		in := 0
		for _, op := range ops[:min(len(ops), 200)] {
			port := uint16(op & 3)
			n := []int{1000, 1000, 1000, 1, 0, 700}[r.IntN(6)]
			var fr []byte
			if op&16 != 0 {
				fr = datagram(op&4 != 0, port, 0, make([]byte, n))
			} else {
				fr = flowFrame(op&4 != 0, port, seqs[port], 0x10|op&8, make([]byte, n))
				seqs[port] += uint32(n)
			}
			if op > 250 {
				fr[r.IntN(len(fr))] ^= 0x40
			}
			frames = append(frames, fr)
			in += len(fr)
		}
		written := 0
		m := Merger{Link: EthernetLen, UDP: true, Write: func(parts [][]byte) {
			for _, p := range parts[1:] {
				written += len(p)
			}
			if len(parts) > 2 {
				written += (len(parts) - 2) * (len(parts[1]) - payloadOf(parts))
			}
		}}
		for _, fr := range frames {
			m.Add(fr)
		}
		m.Flush()
		if written != in {
			t.Fatalf("%d bytes went in, %d came out", in, written)
		}
	})
}

// payloadOf returns the payload of the first segment of a merged frame.
func payloadOf(parts [][]byte) int { return int(binary.NativeEndian.Uint16(parts[0][4:])) }
