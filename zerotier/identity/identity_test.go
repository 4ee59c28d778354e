package identity_test

import (
	"bytes"
	"encoding/hex"
	"testing"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/testvec"
)

type idVectors struct {
	Valid []struct {
		Address      string
		TextPublic   string      `json:"text_public"`
		TextSecret   string      `json:"text_secret"`
		BinaryPublic testvec.Hex `json:"binary_public"`
		BinarySecret testvec.Hex `json:"binary_secret"`
		Fingerprint  testvec.Hex `json:"sha384_address_and_public"`
		DHPublic     testvec.Hex `json:"dh_public"`
		EdPublic     testvec.Hex `json:"ed_public"`
		LocallyValid bool        `json:"locally_valid"`
	}
	Invalid []struct {
		Text, Reason string
		Parses       bool
		LocallyValid bool `json:"locally_valid"`
	}
	TextParsing []struct {
		Text, Note string
		Parses     bool
		HasPrivate bool `json:"has_private"`
		Reprinted  string
	} `json:"text_parsing"`
	BinaryParsing []struct {
		Binary     testvec.Hex
		Note       string
		Parses     bool
		Consumed   int
		HasPrivate bool `json:"has_private"`
	} `json:"binary_parsing"`
}

func loadIDs(t testing.TB) (v idVectors) {
	testvec.Load(t, "identity.json", &v)
	if len(v.Valid) == 0 {
		t.Fatal("no vectors")
	}
	return v
}

func TestValid(t *testing.T) {
	count := testvec.Count(t, "identity.json", "valid")
	for _, tt := range loadIDs(t).Valid {
		count.Judge()
		id, err := identity.Parse(tt.TextSecret + "\n")
		if err != nil {
			t.Fatalf("Parse(%s): %v", tt.Address, err)
		}
		if err := id.Validate(); err != nil {
			t.Errorf("%s: Validate: %v", tt.Address, err)
		}
		if got := id.Address().String(); got != tt.Address {
			t.Errorf("Address = %s, want %s", got, tt.Address)
		}
		if id.SecretString() != tt.TextSecret || id.String() != tt.TextPublic {
			t.Errorf("%s: text forms differ", tt.Address)
		}
		if got := id.AppendBinary(nil); !bytes.Equal(got, tt.BinaryPublic) {
			t.Errorf("%s: binary form %x, want %x", tt.Address, got, tt.BinaryPublic)
		}
		if got := id.Fingerprint(); !bytes.Equal(got[:], tt.Fingerprint) {
			t.Errorf("%s: fingerprint %x", tt.Address, got)
		}
		for _, b := range []testvec.Hex{tt.BinaryPublic, tt.BinarySecret} {
			back, n, err := identity.Unmarshal(b)
			if err != nil || n != len(b) || !back.Equal(id) {
				t.Errorf("%s: Unmarshal = %v, %d, %v", tt.Address, back, n, err)
			}
		}
	}
}

func TestInvalid(t *testing.T) {
	count := testvec.Count(t, "identity.json", "invalid")
	for _, tt := range loadIDs(t).Invalid {
		count.Judge()
		id, err := identity.Parse(tt.Text)
		if (err == nil) != tt.Parses {
			t.Errorf("%s: Parse error = %v, want parses: %v", tt.Reason, err, tt.Parses)
		}
		if err == nil && (id.Validate() == nil) != tt.LocallyValid {
			t.Errorf("%s: Validate = %v, want valid: %v", tt.Reason, id.Validate(), tt.LocallyValid)
		}
	}
}

// The reference parser is lenient where chapter 01 §2.5 lets us be strict: what
// we accept must be accepted there and print alike; upper case and a trailing
// newline must be accepted.
func TestTextParsing(t *testing.T) {
	count := testvec.Count(t, "identity.json", "text_parsing")
	for _, tt := range loadIDs(t).TextParsing {
		count.Judge()
		id, err := identity.Parse(tt.Text)
		if err != nil {
			if tt.Note == "upper case hex" || tt.Note == "trailing newline" {
				t.Errorf("%s: %v", tt.Note, err)
			}
			continue
		}
		got := id.String()
		if tt.HasPrivate {
			got = id.SecretString()
		}
		if !tt.Parses || got != tt.Reprinted {
			t.Errorf("%s: parsed as %s, reference: %v %s", tt.Note, got, tt.Parses, tt.Reprinted)
		}
	}
}

func TestBinaryParsing(t *testing.T) {
	count := testvec.Count(t, "identity.json", "binary_parsing")
	for _, tt := range loadIDs(t).BinaryParsing {
		count.Judge()
		id, n, err := identity.Unmarshal(tt.Binary)
		if (err == nil) != tt.Parses {
			t.Errorf("%s: error = %v, want parses: %v", tt.Note, err, tt.Parses)
			continue
		}
		if err == nil && (n != tt.Consumed || id.HasSecret() != tt.HasPrivate) {
			t.Errorf("%s: consumed %d, secret %v", tt.Note, n, id.HasSecret())
		}
	}
}

func TestMismatchedSecret(t *testing.T) {
	v := loadIDs(t).Valid
	secret := v[1].TextSecret[len(v[1].TextPublic):]
	id, err := identity.Parse(v[0].TextPublic + secret)
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Validate(); err != identity.ErrKeyPair {
		t.Errorf("Validate = %v, want ErrKeyPair", err)
	}
}

// withHalves builds an identity from bare keys, for vectors that give no address.
func withHalves(t *testing.T, dhPublic, edPublic, dhSecret, edSeed []byte) *identity.Identity {
	t.Helper()
	b := append([]byte{1, 2, 3, 4, 5, 0}, make([]byte, 129)...)
	copy(b[6:], dhPublic)
	copy(b[38:], edPublic)
	b[70] = 64
	copy(b[71:], dhSecret)
	copy(b[103:], edSeed)
	id, _, err := identity.Unmarshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestAgree(t *testing.T) {
	var v struct {
		Cases []struct {
			Note    string
			Mine    testvec.Hex `json:"dh_private_mine"`
			Theirs  testvec.Hex `json:"dh_public_theirs"`
			Raw     testvec.Hex `json:"raw_x25519"`
			Session testvec.Hex `json:"session_key"`
		}
	}
	testvec.Load(t, "agreement.json", &v)
	count := testvec.Count(t, "agreement.json", "cases")
	for _, tt := range v.Cases {
		count.Judge()
		me := withHalves(t, nil, nil, tt.Mine, nil)
		got, err := me.Agree(withHalves(t, tt.Theirs, nil, nil, nil))
		if bytes.Equal(tt.Raw, make([]byte, 32)) {
			if err != identity.ErrBadPeer {
				t.Errorf("%s: error %v, want ErrBadPeer", tt.Note, err)
			}
			continue
		}
		if err != nil || !bytes.Equal(got[:], tt.Session) {
			t.Errorf("%s: Agree = %x, %v, want %x", tt.Note, got, err, tt.Session)
		}
	}
}

func TestSignature(t *testing.T) {
	var v struct {
		Cases []struct {
			Seed      testvec.Hex `json:"ed_seed"`
			Public    testvec.Hex `json:"ed_public"`
			Message   testvec.Hex
			Signature testvec.Hex
		}
		Checks []struct {
			Note      string
			Public    testvec.Hex `json:"ed_public"`
			Message   testvec.Hex
			Signature testvec.Hex
			Verifies  bool
		}
	}
	testvec.Load(t, "signature.json", &v)
	cases, checks := testvec.Count(t, "signature.json", "cases"), testvec.Count(t, "signature.json", "checks")
	for i, tt := range v.Cases {
		cases.Judge()
		id := withHalves(t, nil, tt.Public, nil, tt.Seed)
		got, err := id.Sign(tt.Message)
		if err != nil || !bytes.Equal(got[:], tt.Signature) {
			t.Errorf("case %d: Sign = %x, %v", i, got, err)
		}
		if !id.Verify(tt.Message, tt.Signature) {
			t.Errorf("case %d: does not verify", i)
		}
	}
	for _, tt := range v.Checks {
		checks.Judge()
		got := withHalves(t, nil, tt.Public, nil, nil).Verify(tt.Message, tt.Signature)
		// The strict check refuses the malleated form that the reference accepts.
		if got != tt.Verifies && !(tt.Verifies && !got && malleated(tt.Signature)) {
			t.Errorf("%s: Verify = %v, want %v", tt.Note, got, tt.Verifies)
		}
	}
}

// malleated reports S >= L: the top bits of S exceed those of the group order.
func malleated(sig []byte) bool { return len(sig) == 96 && sig[63] >= 0x10 }

func TestKDF(t *testing.T) {
	var v struct {
		Cases []struct {
			Key       testvec.Hex
			Label     string
			Context   byte
			Iteration uint32
			Output    testvec.Hex
		}
	}
	testvec.Load(t, "kbkdf.json", &v)
	count := testvec.Count(t, "kbkdf.json", "cases")
	for _, tt := range v.Cases {
		count.Judge()
		got := identity.KDF([48]byte(tt.Key), tt.Label[0], tt.Context, tt.Iteration)
		if !bytes.Equal(got[:], tt.Output) {
			t.Errorf("KDF(%s, %d, %d) = %x, want %x", tt.Label, tt.Context, tt.Iteration, got, tt.Output)
		}
	}
}

func TestGenerate(t *testing.T) {
	id, err := identity.Generate(nil)
	if err != nil {
		t.Fatal(err)
	}
	back, err := identity.Parse(id.SecretString())
	if err != nil || back.Validate() != nil || !back.Equal(id) {
		t.Errorf("generated identity %s does not survive: %v", id, err)
	}
	if _, err := identity.Generate(bytes.NewReader(nil)); err == nil {
		t.Error("Generate without randomness succeeded")
	}
}

func FuzzParse(f *testing.F) {
	v := loadIDs(f)
	for _, tt := range v.TextParsing {
		f.Add(tt.Text)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := identity.Parse(s)
		if err != nil {
			return
		}
		if back, err := identity.Parse(id.String()); err != nil || !back.Equal(id) {
			t.Errorf("%q does not survive a round trip", s)
		}
	})
}

func FuzzUnmarshal(f *testing.F) {
	for _, tt := range loadIDs(f).BinaryParsing {
		f.Add([]byte(tt.Binary))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		id, n, err := identity.Unmarshal(b)
		if err == nil && !bytes.Equal(id.AppendBinary(nil)[:70], b[:70]) {
			t.Errorf("%s (%d bytes) does not survive a round trip", hex.EncodeToString(b), n)
		}
	})
}

func BenchmarkAddressHash(b *testing.B) {
	id, err := identity.Parse(loadIDs(b).Valid[0].TextPublic)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if id.Validate() != nil {
			b.Fatal("invalid")
		}
	}
}
