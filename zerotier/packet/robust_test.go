package packet

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// FuzzSealOpen checks that what is sealed opens, whatever a relay did to the hop
// count, and that no other change of one bit goes unnoticed.
func FuzzSealOpen(f *testing.F) {
	f.Add([]byte("payload"), uint8(3), uint8(2), uint64(7), uint16(300))
	k, s := testKeys(), new(Scratch)
	f.Fuzz(func(t *testing.T, payload []byte, suite, hops uint8, id uint64, flip uint16) {
		suite &= 3
		if Suite(suite) == SuiteTrusted || len(payload) > MaxPayload {
			return
		}
		p := append(make(Packet, HeaderLen), payload...)
		PutHeader(p, ID(id), 0x0102030405, 0x0a0b0c0d0e, VerbFrame)
		p.SetFragmented(NeedsSplit(len(p), DefaultMTU))
		k.Seal(p, Suite(suite), s)
		if p.Hops() != 0 || p.Suite() != Suite(suite) || p.Fragmented() != (len(p) > DefaultMTU) {
			t.Fatalf("suite %d: flags %02x", suite, p[offFCH])
		}
		p.SetHops(hops)
		damaged := Packet(bytes.Clone(p))
		if err := k.Open(p, s); err != nil {
			t.Fatalf("suite %d: %v", suite, err)
		}
		if !bytes.Equal(p.Payload(), payload) || p.Verb() != VerbFrame {
			t.Fatalf("suite %d: payload differs", suite)
		}
		bit := int(flip) % (8 * len(damaged))
		if mask := byte(1) << (bit % 8); bit/8 != offFCH || mask > hopsMask {
			damaged[bit/8] ^= mask
			if k.Open(damaged, s) == nil {
				t.Fatalf("suite %d: change of bit %d accepted", suite, bit)
			}
		}
	})
}

// FuzzCompress checks that our decoder, which insists on the end-of-block rules,
// reads what the encoder writes.
func FuzzCompress(f *testing.F) {
	f.Add(bytes.Repeat([]byte("abcdefg"), 30))
	f.Add(make([]byte, 100))
	f.Fuzz(func(t *testing.T, payload []byte) {
		if len(payload) > MaxPayload {
			return
		}
		p := append(make(Packet, HeaderLen), payload...)
		PutHeader(p, 7, 1, 2, VerbUserMessage)
		c, ok := Compress(p, make([]byte, 0, MaxPacket))
		if !ok {
			return
		}
		if len(c) >= len(p) || !c.Compressed() || c.Verb() != VerbUserMessage {
			t.Fatalf("%d bytes compressed to %d", len(p), len(c))
		}
		out, err := Decompress(c, make([]byte, 0, MaxPacket))
		if err != nil || !bytes.Equal(out, p) {
			t.Fatalf("does not survive: %v", err)
		}
	})
}

// FuzzDatagrams feeds a train of datagrams to the receiving side up to the
// decoder: first a length byte, then the datagram.
func FuzzDatagrams(f *testing.F) {
	k := testKeys()
	p := make(Packet, 400)
	PutHeader(p, 9, 1, 2, VerbEcho)
	p.SetFragmented(true)
	k.Seal(p, SuiteAES, new(Scratch))
	var seed []byte
	var hdr [FragmentHeaderLen]byte
	Split(p, 150, true, &hdr, func(head, data []byte) {
		seed = append(seed, byte(len(head)+len(data)))
		seed = append(append(seed, head...), data...)
	})
	f.Add(seed)
	f.Fuzz(func(t *testing.T, b []byte) {
		r := NewReassembler(16, time.Second)
		now, src := time.Unix(1, 0), netip.MustParseAddr("192.0.2.1")
		s, dst, plain := new(Scratch), make([]byte, 0, MaxPacket), make([]byte, 0, MaxPacket)
		for len(b) > 0 {
			n := min(int(b[0]), len(b)-1)
			d := b[1 : 1+n]
			b = b[1+n:]
			now = now.Add(10 * time.Millisecond)
			var whole []byte
			switch Classify(d) {
			case KindFragment:
				fr, err := ParseFragment(d)
				if err != nil {
					continue
				}
				if whole, _ = r.AddFragment(now, src, fr, dst); whole != nil {
					dst = whole[:0]
				}
			case KindPacket:
				p, err := Parse(d)
				if err != nil {
					t.Fatal(err)
				}
				if whole = p; p.Fragmented() {
					if whole, _ = r.AddHead(now, src, p, dst); whole != nil {
						dst = whole[:0]
					}
				}
			}
			if whole == nil {
				continue
			}
			if len(whole) > MaxPacket || len(whole) < HeaderLen {
				t.Fatalf("packet of %d bytes", len(whole))
			}
			p := Packet(bytes.Clone(whole))
			if k.Open(p, s) == nil {
				_, _ = Decompress(p, plain)
			}
			_ = p.Verb().String()
		}
	})
}

// A full frame travels in two datagrams: neither end may allocate for it.
func TestSplitAndReassembleNoAllocs(t *testing.T) {
	for _, size := range []int{2838, 9900} {
		r, hdr := NewReassembler(0, 0), new([FragmentHeaderLen]byte)
		now, src := time.Unix(1, 0), netip.MustParseAddr("192.0.2.1")
		p, dst, datagram := make(Packet, size), make([]byte, 0, MaxPacket), make([]byte, 0, DefaultMTU)
		id, got := ID(0), 0
		run := func() {
			id++
			PutHeader(p, id, 1, 2, VerbFrame)
			p.SetFragmented(true)
			Split(p, DefaultMTU, true, hdr, func(head, data []byte) {
				d := append(append(datagram[:0], head...), data...)
				var out []byte
				if head == nil {
					out, _ = r.AddHead(now, src, Packet(d), dst)
				} else {
					out, _ = r.AddFragment(now, src, Fragment(d), dst)
				}
				if bytes.Equal(out, p) {
					got++
				}
				if out != nil {
					dst = out[:0]
				}
			})
		}
		for range 2 * reassemblyShards { // buffers grow to their size once
			run()
		}
		if n := testing.AllocsPerRun(200, run); n != 0 {
			t.Errorf("%d bytes: %v allocations", size, n)
		}
		if got != int(id) {
			t.Errorf("%d bytes: %d of %d packets arrived", size, got, id)
		}
	}
}

// Several workers deliver the datagrams of many packets in any order, with
// duplicates and with fragments that never complete.
func TestReassembleConcurrently(t *testing.T) {
	const packets = 200
	r := NewReassembler(1024, time.Minute)
	now := time.Unix(1, 0)
	var train [][]byte
	want := make(map[ID]Packet)
	for id := range ID(packets) {
		p := bytes.Repeat([]byte{byte(id)}, 1500+20*int(id))
		PutHeader(p, id, 1, 2, VerbFrame)
		Packet(p).SetFragmented(true)
		want[id] = p
		Split(p, DefaultMTU, id%2 == 0, new([FragmentHeaderLen]byte), func(head, data []byte) {
			d := append(bytes.Clone(head), data...)
			train = append(train, d)
			if id%3 == 0 && head != nil {
				train = append(train, d)
			}
		})
	}
	rnd := rand.New(rand.NewChaCha8([32]byte{2}))
	rnd.Shuffle(len(train), func(i, j int) { train[i], train[j] = train[j], train[i] })

	var mu sync.Mutex
	seen := make(map[ID]int)
	var wg sync.WaitGroup
	const workers = 4
	for w := range workers {
		wg.Go(func() {
			src := netip.AddrFrom4([4]byte{192, 0, 2, byte(w)})
			dst := make([]byte, 0, MaxPacket)
			for i := w; i < len(train); i += workers {
				d := train[i]
				var out []byte
				var done bool
				if Classify(d) == KindFragment {
					out, done = r.AddFragment(now, src, Fragment(d), dst)
				} else {
					out, done = r.AddHead(now, src, Packet(d), dst)
				}
				if !done {
					continue
				}
				id := Packet(out).ID()
				if !bytes.Equal(out, want[id]) {
					t.Errorf("packet %d differs", id)
				}
				mu.Lock()
				seen[id]++
				mu.Unlock()
				dst = out[:0]
			}
		})
	}
	wg.Wait()
	for id := range want {
		if seen[id] != 1 {
			t.Errorf("packet %d completed %d times", id, seen[id])
		}
	}
	if n := r.Completed.Load(); n != packets {
		t.Errorf("counted %d completed packets", n)
	}
}

func TestReassemblerSize(t *testing.T) {
	now, src := time.Unix(1, 0), netip.MustParseAddr("192.0.2.1")
	r := NewReassembler(1, time.Second) // one slot per shard
	p := make(Packet, HeaderLen)
	for id := range ID(1000) {
		PutHeader(p, id, 1, 2, VerbFrame)
		r.AddHead(now, src, p, nil)
	}
	if got := r.Displaced.Load(); got != 1000-reassemblyShards {
		t.Errorf("%d displaced", got)
	}
	f := make(Fragment, MaxPacket-HeaderLen+FragmentHeaderLen+1)
	copy(f, p[:13])
	f[offSrc], f[offFragCount] = fragmentIndicator, 0x21
	if _, ok := r.AddFragment(now, src, f, nil); ok || r.TooLong.Load() != 1 {
		t.Error("packet over the limit not refused")
	}
	PutHeader(p, 3, 1, 2, VerbFrame)
	now = now.Add(time.Second)
	r.AddHead(now, src, p, nil)
	if r.Expired.Load() == 0 {
		t.Error("old entry not counted as expired")
	}
}

func BenchmarkReassemble(b *testing.B) {
	r, hdr := new(Reassembler), new([FragmentHeaderLen]byte)
	now, src := time.Unix(1, 0), netip.MustParseAddr("192.0.2.1")
	p, dst := make(Packet, 2838), make([]byte, 0, MaxPacket)
	d := make([]byte, 0, DefaultMTU)
	id := ID(0)
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	for b.Loop() {
		id++
		PutHeader(p, id, 1, 2, VerbFrame)
		Split(p, DefaultMTU, true, hdr, func(head, data []byte) {
			if d = append(append(d[:0], head...), data...); head == nil {
				r.AddHead(now, src, Packet(d), dst)
			} else {
				out, _ := r.AddFragment(now, src, Fragment(d), dst)
				dst = out[:0]
			}
		})
	}
}
