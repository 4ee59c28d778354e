package network_test

import (
	"encoding/binary"
	"testing"
	"time"

	"ztgate/zerotier/internal/budget"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// Afford counts the signatures that are checked for others.
func (r *recorder) Afford(w *vl1.Worker, from *vl1.Peer, k budget.Kind, pieces int) (budget.Work, bool) {
	work, ok := r.Core.Afford(w, from, k, pieces)
	if ok {
		r.checked += pieces
	}
	return work, ok
}

// forgeries are packets of every kind that carries a signature, with a bad one each.
func forgeries(t *testing.T, id vl2.NetworkID, from *host, now time.Time) map[string]func(i int) (packet.Verb, []byte) {
	com := func(i int) []byte {
		c, err := vl2.NewCOM(from.id, id, from.id, now.UnixMilli()+int64(i), 1_800_000)
		if err != nil {
			t.Fatal(err)
		}
		c.Signer = id.Controller()
		return c.Append(nil)
	}
	group := vl2.MulticastGroup{MAC: vl2.BroadcastMAC}
	return map[string]func(i int) (packet.Verb, []byte){
		"EXT_FRAME": func(i int) (packet.Verb, []byte) {
			b := append(append(id.Append(nil), 1), com(i)...)
			to, own := vl2.MACOf(id, 1), vl2.MACOf(id, from.id.Address())
			return packet.VerbExtFrame, append(append(append(append(b, to[:]...), own[:]...), 8, 0), frame...)
		},
		"MULTICAST_FRAME": func(i int) (packet.Verb, []byte) {
			b := append(append(id.Append(nil), 1), com(i)...)
			return packet.VerbMulticastFrame, append(append(group.Append(b), 8, 0), frame...)
		},
		"MULTICAST_GATHER": func(i int) (packet.Verb, []byte) {
			b := group.Append(append(id.Append(nil), 1))
			return packet.VerbMulticastGather, append(binary.BigEndian.AppendUint32(b, 10), com(i)...)
		},
		"NETWORK_CREDENTIALS": func(i int) (packet.Verb, []byte) {
			return packet.VerbNetworkCredentials, append(com(i), 0, 0, 0, 0, 0, 0, 0, 0, 0)
		},
		"NETWORK_CONFIG": func(i int) (packet.Verb, []byte) {
			chunks, err := vl2.AppendChunks(from.id, id, []byte("nothing"), uint64(i+1), 0)
			if err != nil {
				t.Fatal(err)
			}
			return packet.VerbNetworkConfig, chunks[0]
		},
	}
}

// Whoever knows the number of a network can't make its members check more signatures
// than their budget for strangers has, in whatever packet; members notice nothing.
func TestForgedSignatures(t *testing.T) {
	n, r, a, b, id := up(t)
	talk(n, a, b, id)
	stranger := newHost(t, n, testIDs(t)[3], r.core.Planet(), nil, ap("203.0.113.9:9993"))
	stranger.send(n, b, packet.VerbNOP, nil)
	n.Run(2 * time.Second)
	if b.core.Peer(stranger.id.Address()) == nil {
		t.Fatal("B doesn't know the stranger")
	}
	for name, next := range forgeries(t, id, stranger, n.Now) {
		b.peers.checked, b.got = 0, nil
		before, began := b.layer.Stats(), n.Now
		sent := 0
		for i := 0; n.Now.Sub(began) < 3*time.Second; n.Run(10 * time.Millisecond) {
			for range 40 { // 4,000 a second
				v, payload := next(i)
				stranger.send(n, b, v, payload)
				i++
			}
			sent += a.write(n, id, vl2.MACOf(id, b.id.Address()), vl2.EtherTypeIPv4, frame)
		}
		n.Run(time.Second)
		after := b.layer.Stats()
		// 1 % of three seconds and what one may cause at once, at 85 µs each.
		most := int((30*time.Millisecond + 20*time.Millisecond) / (85 * time.Microsecond) * 3 / 2)
		if b.peers.checked == 0 || b.peers.checked > most {
			t.Errorf("%s: %d signatures checked, want at most %d", name, b.peers.checked, most)
		}
		if after.OverBudget == before.OverBudget && after.CredentialFlood == before.CredentialFlood {
			t.Errorf("%s: nothing was refused: %+v", name, after)
		}
		if got := b.count(frame); got != sent {
			t.Errorf("%s: %d of A's %d frames came", name, got, sent)
		}
		n.Run(10 * time.Second)
	}
}

// What was verified once costs nothing when it comes again, nor does what is older than
// what is held.
func TestKnownSignaturesCostNothing(t *testing.T) {
	n, r, a, b, id := up(t)
	old, _ := a.layer.Network(id)
	n.Run(2 * time.Minute)
	talk(n, a, b, id)
	cur, _ := a.layer.Network(id)
	if old.Config.COM.Timestamp() >= cur.Config.COM.Timestamp() {
		t.Fatal("no newer certificate")
	}
	r.ctl.revoke = append(r.ctl.revoke, 0x1234567890)
	n.Run(2 * time.Second)
	b.peers.checked = 0
	revoked := revocation(t, r, id, 0x1234567890, vl2.TypeCOM, 0, n.Now.UnixMilli()-60_000)
	for range 50 {
		for _, c := range []vl2.Credential{cur.Config.COM, old.Config.COM, revoked} {
			a.send(n, b, packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, c))
		}
		n.Run(1100 * time.Millisecond)
	}
	if b.peers.checked > 4 { // of A's own renewals, once a minute
		t.Errorf("%d signatures checked", b.peers.checked)
	}
}

// What is packed with bad signatures is looked at up to the fourth of them.
func TestBadSignatures(t *testing.T) {
	n, _, a, b, id := up(t)
	talk(n, a, b, id)
	n.Run(10 * time.Second)
	var forged []vl2.Credential
	for i := range 20 {
		c, err := vl2.NewCOM(a.id, id, a.id, n.Now.UnixMilli()+int64(i), 1_800_000)
		if err != nil {
			t.Fatal(err)
		}
		c.Signer = id.Controller()
		forged = append(forged, c)
	}
	b.peers.checked = 0
	before := b.layer.Stats()
	a.send(n, b, packet.VerbNetworkCredentials, vl2.AppendCredentials(nil, forged...))
	n.Run(time.Second)
	if b.peers.checked != 4 || b.layer.Stats().RejectedCredentials-before.RejectedCredentials != 4 {
		t.Errorf("%d signatures checked, %+v", b.peers.checked, b.layer.Stats())
	}
}
