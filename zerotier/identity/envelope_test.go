package identity

import (
	"bytes"
	"errors"
	"testing"

	"ztgate/zerotier/internal/testvec"
)

// Sender and receiver of an envelope find the key that the reference found.
func TestEnvelopeKey(t *testing.T) {
	var v struct {
		Identities map[string]struct {
			Secret string `json:"identity_secret"`
		}
		Cases []struct {
			Name, Receiver string
			Secret         testvec.Hex `json:"ephemeral_secret"`
			Public         testvec.Hex `json:"ephemeral_public"`
			Key            testvec.Hex `json:"aes_key"`
		}
	}
	testvec.Load(t, "sealed-hello.json", &v)
	count := testvec.Count(t, "sealed-hello.json", "cases")
	for _, c := range v.Cases {
		if c.Secret == nil {
			count.Leave(c.Name, "has no envelope that the sender made")
			continue
		}
		count.Judge()
		if c.Name == "wrong_receiver" {
			c.Receiver = "R"
		}
		to, err := Parse(v.Identities[c.Receiver].Secret)
		if err != nil {
			t.Fatal(err)
		}
		key, public, err := to.Public().encapsulate((*[32]byte)(c.Secret))
		if err != nil || !bytes.Equal(key[:], c.Key) || !bytes.Equal(public[:], c.Public) {
			t.Errorf("%s: made key %x with %x, %v", c.Name, key, public, err)
		}
		if key, err := to.Decapsulate(&public); err != nil || !bytes.Equal(key[:], c.Key) {
			t.Errorf("%s: found key %x, %v", c.Name, key, err)
		}
	}
}

// Values that yield the same key for everybody are refused, and so is opening without a
// secret key.
func TestEnvelopeKeyRefused(t *testing.T) {
	id, err := Generate(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, public := range [][EnvelopeKeyLen]byte{{}, {1}} {
		if _, err := id.Decapsulate(&public); !errors.Is(err, ErrBadPeer) {
			t.Errorf("%x: %v", public, err)
		}
	}
	if _, err := id.Public().Decapsulate(&[EnvelopeKeyLen]byte{9}); !errors.Is(err, ErrNoKey) {
		t.Error(err)
	}
	_, first, err := id.Encapsulate()
	if err != nil {
		t.Fatal(err)
	}
	if _, second, _ := id.Encapsulate(); first == second {
		t.Error("one key for two envelopes")
	}
}
