package packet

import (
	"bytes"
	"testing"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/testvec"
)

type sealedHello struct {
	Name, Sender, Receiver string
	Clear                  testvec.Hex `json:"hello_clear"`
	Masked                 testvec.Hex `json:"hello_masked"`
	MaskedFrom             int         `json:"masked_from"`
	Session                testvec.Hex `json:"session_key"`
	Key                    testvec.Hex `json:"aes_key"`
	Public                 testvec.Hex `json:"ephemeral_public"`
	Secret                 testvec.Hex `json:"ephemeral_secret"`
	Inner, Sealed          testvec.Hex
	Datagrams              []testvec.Hex
}

func sealedHellos(t testing.TB) (ids map[string]*identity.Identity, cases []sealedHello) {
	var v struct {
		Identities map[string]struct {
			Secret string `json:"identity_secret"`
		}
		Cases []sealedHello
	}
	testvec.Load(t, "sealed-hello.json", &v)
	ids = make(map[string]*identity.Identity)
	for name, x := range v.Identities {
		id, err := identity.Parse(x.Secret)
		if err != nil {
			t.Fatal(err)
		}
		ids[name] = id
	}
	return ids, v.Cases
}

// HELLOs are put into envelopes and taken out of them as the reference does it.
func TestEnvelopes(t *testing.T) {
	ids, cases := sealedHellos(t)
	count := testvec.Count(t, "sealed-hello.json", "cases")
	s := new(Scratch)
	for _, c := range cases {
		if c.Secret == nil || c.Masked == nil {
			count.Leave(c.Name, "no HELLO was put into an envelope by the sender's rules")
			continue
		}
		count.Judge()
		k := NewKeys([identity.SessionLen]byte(c.Session))
		p := Packet(bytes.Clone(c.Clear))
		k.MaskHello(p, c.MaskedFrom, s)
		if !bytes.Equal(p, c.Masked) {
			t.Errorf("%s: masked %x", c.Name, []byte(p))
		}
		p.SetFragmented(Packet(c.Sealed).Fragmented())
		e := newEnvelope((*[EnvelopeLen]byte)(c.Key), (*[EnvelopeLen]byte)(c.Public))
		p = k.SealHello(p, e, s)
		if !bytes.Equal(p, c.Sealed) {
			t.Errorf("%s: sealed %x, want %x", c.Name, []byte(p), c.Sealed)
		}
		if want := p.Verb() != VerbHello; e.Suits(p.ID(), p.Destination()) != want {
			t.Errorf("%s: %v", c.Name, !want)
		}
		to := c.Receiver
		if c.Name == "wrong_receiver" {
			to = "R"
		}
		inner, err := p.OpenEnvelope(ids[to])
		if err != nil || !bytes.Equal(inner, c.Inner) || !inner.Enveloped() {
			t.Errorf("%s: opened %x, %v, want %x", c.Name, []byte(inner), err, c.Inner)
			continue
		}
		if err := k.Open(inner, s); err != nil || inner.Verb() != VerbHello && c.Name != "sealed_echo" {
			t.Errorf("%s: inner packet: %v, verb %v", c.Name, err, inner.Verb())
		}
	}
}

// None of the HELLOs of a sender that asks first is lost to the reference.
func TestEnvelopeSuits(t *testing.T) {
	id, err := identity.Generate(nil)
	if err != nil {
		t.Fatal(err)
	}
	e, err := NewEnvelope(id)
	if err != nil {
		t.Fatal(err)
	}
	k, s, unfit := testKeys(), new(Scratch), 0
	for n := range 2000 {
		p := Packet(make([]byte, HeaderLen+100))
		PutHeader(p, ID(n), id.Address(), 1, VerbHello)
		suits := e.Suits(ID(n), id.Address())
		if !suits {
			unfit++
		}
		if p = k.SealHello(p, e, s); suits == (p.Verb() == VerbHello) {
			t.Fatalf("ID %d: %v, verb %v", n, suits, p.Verb())
		}
	}
	if unfit < 20 || unfit > 120 {
		t.Errorf("%d of 2,000 don't suit, want about one in 32", unfit)
	}
}

func FuzzOpenEnvelope(f *testing.F) {
	ids, cases := sealedHellos(f)
	for _, c := range cases {
		for _, d := range c.Datagrams {
			f.Add([]byte(d))
		}
	}
	k, s := testKeys(), new(Scratch)
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := Parse(bytes.Clone(b))
		if err != nil || !p.Enveloped() {
			return
		}
		inner, err := p.OpenEnvelope(ids["L"])
		if err != nil {
			return
		}
		if len(inner) != len(b)-EnvelopeLen || !bytes.Equal(inner[:offMAC], b[:offMAC]) {
			t.Errorf("%x became %x", b, []byte(inner))
		}
		k.Open(inner, s)
	})
}

func BenchmarkEnvelope(b *testing.B) {
	id, err := identity.Generate(nil)
	if err != nil {
		b.Fatal(err)
	}
	e, err := NewEnvelope(id)
	if err != nil {
		b.Fatal(err)
	}
	k, s := testKeys(), new(Scratch)
	sealed := k.SealHello(make(Packet, HeaderLen+109), e, s)
	p := make(Packet, len(sealed))
	b.Run("open", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			copy(p, sealed)
			if _, err := p.OpenEnvelope(id); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("make", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := NewEnvelope(id); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("seal", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			p := append(make(Packet, 0, len(sealed)), sealed[:len(sealed)-EnvelopeLen]...)
			k.SealHello(p, e, s)
		}
	})
}
