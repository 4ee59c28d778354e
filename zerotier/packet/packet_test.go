package packet

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"
	"time"

	"ztgate/zerotier/internal/testvec"
)

func TestArmor(t *testing.T) {
	var v struct {
		Cases []struct {
			Suite       Suite
			Session     testvec.Hex `json:"session_key"`
			Plain       testvec.Hex
			Armored     testvec.Hex
			Dearmored   testvec.Hex
			TrustedPath testvec.Hex `json:"trusted_path_id"`
		}
		Checks []struct {
			Note     string
			Session  testvec.Hex `json:"session_key"`
			Packet   testvec.Hex
			Accepted bool
		}
		CryptField []struct {
			Session       testvec.Hex `json:"session_key"`
			Start, Length int
			Before, After testvec.Hex
		} `json:"crypt_field"`
	}
	testvec.Load(t, "armor.json", &v)
	s := new(Scratch)
	cases, checks, fields := testvec.Count(t, "armor.json", "cases"), testvec.Count(t, "armor.json", "checks"), testvec.Count(t, "armor.json", "crypt_field")
	for i, tt := range v.Cases {
		cases.Judge()
		if tt.Suite == SuiteTrusted {
			p := Packet(bytes.Clone(tt.Plain))
			if p.SetTrusted(binary.BigEndian.Uint64(tt.TrustedPath)); !bytes.Equal(p, tt.Armored) || p.TrustedPath() != binary.BigEndian.Uint64(tt.TrustedPath) {
				t.Errorf("case %d: suite 2 differs", i)
			}
			if NewKeys([48]byte(tt.Session)).Open(p, s) == nil {
				t.Errorf("case %d: Open takes suite 2", i)
			}
			continue
		}
		k := NewKeys([48]byte(tt.Session))
		p := Packet(bytes.Clone(tt.Plain))
		k.Seal(p, tt.Suite, s)
		if !bytes.Equal(p, tt.Armored) {
			t.Errorf("case %d: Seal suite %d = %x, want %x", i, tt.Suite, []byte(p), tt.Armored)
		}
		p = Packet(bytes.Clone(tt.Armored))
		if err := k.Open(p, s); err != nil || !bytes.Equal(p, tt.Dearmored) {
			t.Errorf("case %d: Open suite %d: %v", i, tt.Suite, err)
		}
	}
	for _, tt := range v.Checks {
		checks.Judge()
		err := NewKeys([48]byte(tt.Session)).Open(Packet(bytes.Clone(tt.Packet)), s)
		if (err == nil) != tt.Accepted {
			t.Errorf("%s: Open = %v, want accepted: %v", tt.Note, err, tt.Accepted)
		}
	}
	for i, tt := range v.CryptField {
		fields.Judge()
		p := Packet(bytes.Clone(tt.Before))
		NewKeys([48]byte(tt.Session)).MaskHello(p[:tt.Start+tt.Length], tt.Start, s)
		if !bytes.Equal(p, tt.After) {
			t.Errorf("crypt field %d differs", i)
		}
	}
}

func TestSplit(t *testing.T) {
	var v struct {
		Cases []struct {
			PacketSize int `json:"packet_size"`
			MTU        int
			Suite      Suite
			Session    testvec.Hex `json:"session_key"`
			Plain      testvec.Hex
			Armored    testvec.Hex
			Total      int  `json:"datagrams_total"`
			Accepted   bool `json:"accepted_by_reference_receiver"`
			Datagrams  []testvec.Hex
		}
	}
	testvec.Load(t, "fragments.json", &v)
	count := testvec.Count(t, "fragments.json", "cases")
	for _, tt := range v.Cases {
		count.Judge()
		var got [][]byte
		var hdr [FragmentHeaderLen]byte
		Split(Packet(tt.Armored), tt.MTU, false, &hdr, func(head, data []byte) {
			got = append(got, append(bytes.Clone(head), data...))
		})
		if len(got) != tt.Total || Datagrams(tt.PacketSize, tt.MTU) != tt.Total {
			t.Fatalf("%d bytes: %d datagrams, want %d", tt.PacketSize, len(got), tt.Total)
		}
		for i := range got {
			if !bytes.Equal(got[i], tt.Datagrams[i]) {
				t.Errorf("%d bytes: datagram %d differs", tt.PacketSize, i)
			}
		}
		for _, even := range []bool{false, true} {
			out := reassemble(t, Packet(tt.Armored), tt.MTU, even)
			if tt.Total > 1 && (out != nil) != tt.Accepted {
				t.Errorf("%d bytes: reassembled %v, want %v", tt.PacketSize, out != nil, tt.Accepted)
			}
			if out != nil && !bytes.Equal(out, tt.Armored) {
				t.Errorf("%d bytes even %v: reassembled packet differs", tt.PacketSize, even)
			}
		}
	}
}

// reassemble cuts p and joins the datagrams again, last one first.
func reassemble(t *testing.T, p Packet, mtu int, even bool) (out []byte) {
	t.Helper()
	var hdr [FragmentHeaderLen]byte
	var datagrams [][]byte
	Split(p, mtu, even, &hdr, func(head, data []byte) {
		d := append(bytes.Clone(head), data...)
		if len(d) > mtu {
			t.Errorf("datagram of %d bytes exceeds %d", len(d), mtu)
		}
		datagrams = append(datagrams, d)
	})
	var r Reassembler
	now, src := time.Unix(1, 0), netip.MustParseAddr("192.0.2.1")
	for i := len(datagrams) - 1; i >= 0; i-- {
		d := datagrams[i]
		if Classify(d) == KindFragment {
			f, err := ParseFragment(d)
			if err != nil {
				return nil
			}
			if b, ok := r.AddFragment(now, src, f, nil); ok {
				out = b
			}
		} else if b, ok := r.AddHead(now, src, Packet(d), nil); ok {
			out = b
		}
	}
	return out
}

func TestEvenSplitSizes(t *testing.T) {
	for n := DefaultMTU + 1; n <= 9928; n++ {
		var hdr [FragmentHeaderLen]byte
		sizes := make([]int, 0, 8)
		Split(make(Packet, n), DefaultMTU, true, &hdr, func(head, data []byte) { sizes = append(sizes, len(head)+len(data)) })
		for _, s := range sizes[:len(sizes)-1] {
			if s != sizes[0] || s > DefaultMTU {
				t.Fatalf("%d bytes cut into %v", n, sizes)
			}
		}
		if last := sizes[len(sizes)-1]; last > sizes[0] || sizes[0]-last >= len(sizes) {
			t.Fatalf("%d bytes cut into %v", n, sizes)
		}
	}
}

func TestReassemblyBounds(t *testing.T) {
	var r Reassembler
	now := time.Unix(1, 0)
	head := func(id ID, src string) ([]byte, bool) {
		p := make(Packet, HeaderLen)
		PutHeader(p, id, 1, 2, VerbEcho)
		return r.AddHead(now, netip.MustParseAddr(src), p, nil)
	}
	tail := func(id ID, src string) ([]byte, bool) {
		f := make([]byte, FragmentHeaderLen+4)
		PutHeader(append(f, make([]byte, 16)...), id, 1, 2, 0)
		p := make([]byte, HeaderLen)
		PutHeader(p, id, 1, 2, 0)
		copy(f, p[:13])
		f[13], f[14] = 0xff, 0x21
		return r.AddFragment(now, netip.MustParseAddr(src), Fragment(f), nil)
	}
	const step = reassemblyShards // all in one shard
	head(1*step, "192.0.2.9")
	for i := range ID(100) { // a flood from one source keeps to its share
		head((1000+i)*step, "192.0.2.1")
	}
	if _, ok := tail(1*step, "192.0.2.9"); !ok {
		t.Error("a flood from another source displaced an entry")
	}
	if _, ok := tail(1000*step, "192.0.2.1"); ok {
		t.Error("the flood's oldest entry survived")
	}
	head(7, "192.0.2.9")
	now = now.Add(ReassemblyAge)
	if _, ok := tail(7, "192.0.2.9"); ok {
		t.Error("an expired entry was completed")
	}
	if r.Displaced.Load() == 0 || r.Expired.Load() == 0 || r.Completed.Load() != 1 {
		t.Errorf("counters: %d displaced, %d expired, %d completed", r.Displaced.Load(), r.Expired.Load(), r.Completed.Load())
	}
}

func TestCompression(t *testing.T) {
	var v struct {
		Cases []struct {
			Note       string
			Before     testvec.Hex `json:"verb_and_payload_before"`
			Compressed bool
			After      testvec.Hex `json:"verb_and_payload_after"`
		}
		Checks []struct {
			Note     string
			In       testvec.Hex `json:"verb_and_payload"`
			Accepted bool
			After    testvec.Hex `json:"verb_and_payload_after"`
		} `json:"decode_checks"`
	}
	testvec.Load(t, "lz4.json", &v)
	wrap := func(b []byte) Packet { return Packet(append(make([]byte, offVerb), b...)) }
	buf := make([]byte, MaxPacket)
	cases, checks := testvec.Count(t, "lz4.json", "cases"), testvec.Count(t, "lz4.json", "decode_checks")
	for _, tt := range v.Cases {
		cases.Judge()
		p, err := Decompress(wrap(tt.After), buf)
		if err != nil || !bytes.Equal(p[offVerb:], tt.Before) {
			t.Errorf("%s: Decompress: %v", tt.Note, err)
		}
		c, did := Compress(wrap(tt.Before), make([]byte, MaxPacket))
		if did {
			if len(c) >= HeaderLen-1+len(tt.Before) {
				t.Errorf("%s: compressed is not shorter", tt.Note)
			}
			if p, err = Decompress(c, buf); err != nil || !bytes.Equal(p[offVerb:], tt.Before) {
				t.Errorf("%s: own compression does not survive: %v", tt.Note, err)
			}
		} else if tt.Compressed && len(tt.After) < len(tt.Before)*9/10 {
			t.Errorf("%s: not compressed, though the reference saves a tenth", tt.Note)
		}
	}
	for _, tt := range v.Checks {
		checks.Judge()
		p, err := Decompress(wrap(tt.In), buf)
		if (err == nil) != tt.Accepted {
			t.Errorf("%s: error %v, want accepted: %v", tt.Note, err, tt.Accepted)
		} else if err == nil && !bytes.Equal(p[offVerb:], tt.After) {
			t.Errorf("%s: wrong result", tt.Note)
		}
	}
}

func endpointText(ep netip.AddrPort) string {
	if !ep.IsValid() {
		return ""
	}
	return ep.Addr().String() + "/" + itoa(ep.Port())
}

func itoa(p uint16) string {
	return strings.TrimPrefix(netip.AddrPortFrom(netip.IPv4Unspecified(), p).String(), "0.0.0.0:")
}

func TestEndpoint(t *testing.T) {
	var v struct {
		Cases []struct {
			Text     string
			Wire     testvec.Hex
			TextBack string `json:"text_back"`
		}
		Checks []struct {
			Note     string
			Wire     testvec.Hex
			Parses   bool
			Consumed int
			Text     string
		} `json:"parse_checks"`
		Scopes []struct {
			IP    netip.Addr
			Scope Scope
			Hash  int `json:"rate_gate_hash"`
		}
	}
	testvec.Load(t, "inetaddress.json", &v)
	cases, checks, scopes := testvec.Count(t, "inetaddress.json", "cases"), testvec.Count(t, "inetaddress.json", "parse_checks"), testvec.Count(t, "inetaddress.json", "scopes")
	for _, tt := range v.Cases {
		cases.Judge()
		ep, n, err := ParseEndpoint(tt.Wire)
		if err != nil || n != len(tt.Wire) {
			t.Errorf("ParseEndpoint(%x) = %v, %d, %v", tt.Wire, ep, n, err)
		}
		if got := AppendEndpoint(nil, ep); !bytes.Equal(got, tt.Wire) {
			// IPv4-mapped addresses are one of the reference's forms that we send as IPv4.
			if !ep.Addr().Is4In6() {
				t.Errorf("AppendEndpoint(%v) = %x, want %x", ep, got, tt.Wire)
			}
		}
	}
	for _, tt := range v.Checks {
		checks.Judge()
		ep, n, err := ParseEndpoint(tt.Wire)
		if (err == nil) != tt.Parses || err == nil && (n != tt.Consumed || endpointText(ep) != tt.Text) {
			t.Errorf("%s: %v, %d, %v", tt.Note, ep, n, err)
		}
	}
	for _, tt := range v.Scopes {
		scopes.Judge()
		if got := ScopeOf(tt.IP); got != tt.Scope {
			t.Errorf("ScopeOf(%s) = %d, want %d", tt.IP, got, tt.Scope)
		}
		if got := SourceBucket(tt.IP); got != tt.Hash {
			t.Errorf("SourceBucket(%s) = %d, want %d", tt.IP, got, tt.Hash)
		}
	}
}

func testKeys() *Keys { return NewKeys([48]byte{1, 2, 3}) }

func TestNoAllocs(t *testing.T) {
	k, s := testKeys(), new(Scratch)
	p := make(Packet, 1432)
	for _, suite := range []Suite{SuitePoly1305, SuiteSalsa} {
		if n := testing.AllocsPerRun(100, func() {
			PutHeader(p, 7, 1, 2, VerbFrame)
			k.Seal(p, suite, s)
			if k.Open(p, s) != nil {
				t.Fatal("open failed")
			}
		}); n != 0 {
			t.Errorf("suite %d: %v allocations", suite, n)
		}
	}
}

func FuzzOpen(f *testing.F) {
	k := testKeys()
	p := make(Packet, 100)
	PutHeader(p, 7, 1, 2, VerbFrame)
	for _, suite := range []Suite{0, 1, 3} {
		q := Packet(bytes.Clone(p))
		k.Seal(q, suite, new(Scratch))
		f.Add([]byte(q))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if Classify(b) != KindPacket {
			return
		}
		p, err := Parse(b)
		if err != nil {
			t.Fatalf("classified as a packet, but %v", err)
		}
		before := hex.EncodeToString(b)
		s := new(Scratch)
		if k.Open(p, s) != nil {
			return
		}
		plain := hex.EncodeToString(p)
		_ = plain
		out, err := Decompress(p, make([]byte, 0, MaxPacket))
		if err == nil && len(out) > MaxPacket {
			t.Errorf("%s decompresses to %d bytes", before, len(out))
		}
	})
}

func FuzzDecompress(f *testing.F) {
	f.Add([]byte{0x10, 'a', 1, 0, 0x50, 1, 2, 3, 4, 5})
	f.Fuzz(func(t *testing.T, b []byte) {
		p := append(make(Packet, HeaderLen), b...)
		p[offVerb] = flagCompressed | byte(VerbEcho)
		out, err := Decompress(p, make([]byte, 0, MaxPacket))
		if err == nil && (len(out) > MaxPacket || out.Compressed()) {
			t.Errorf("%x gives %d bytes", b, len(out))
		}
	})
}

func FuzzReassemble(f *testing.F) {
	f.Add([]byte{1}, uint8(0x21), uint64(1))
	f.Fuzz(func(t *testing.T, data []byte, count uint8, id uint64) {
		var r Reassembler
		b := append(make([]byte, FragmentHeaderLen), data...)
		b[7], b[13], b[14] = byte(id), 0xff, count
		frag, err := ParseFragment(b)
		if err != nil {
			return
		}
		now := time.Unix(1, 0)
		for range 3 {
			if out, ok := r.AddFragment(now, netip.Addr{}, frag, nil); ok {
				t.Errorf("completed without head: %x", out)
			}
		}
	})
}

func FuzzEndpoint(f *testing.F) {
	f.Add([]byte{4, 1, 2, 3, 4, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		ep, n, err := ParseEndpoint(b)
		if err != nil {
			return
		}
		if n > len(b) {
			t.Fatalf("%x: consumed %d", b, n)
		}
		if back, _, err := ParseEndpoint(AppendEndpoint(nil, ep)); err != nil || back.Port() != ep.Port() {
			t.Errorf("%v does not survive", ep)
		}
	})
}

func BenchmarkSeal(b *testing.B) { benchmark(b, false) }
func BenchmarkOpen(b *testing.B) { benchmark(b, true) }

func benchmark(b *testing.B, open bool) {
	k, s := testKeys(), new(Scratch)
	for _, suite := range []Suite{SuiteSalsa, SuiteAES} {
		for _, n := range []int{1400, 2838} {
			b.Run("suite"+string('0'+byte(suite))+"/"+itoa(uint16(n)), func(b *testing.B) {
				p := make(Packet, n)
				PutHeader(p, 7, 1, 2, VerbFrame)
				k.Seal(p, suite, s)
				sealed := bytes.Clone(p)
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for b.Loop() {
					copy(p, sealed)
					if !open {
						k.Seal(p, suite, s)
					} else if k.Open(p, s) != nil {
						b.Fatal("open failed")
					}
				}
			})
		}
	}
}
