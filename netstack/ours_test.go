package netstack

import (
	"bytes"
	"testing"

	"ztgate/netstack/internal/pkttest"
)

// TestOurs: packets of the caller's own are taken, and leave no trace. Others of the same
// batch go on, and what comes from the overlay is nobody's own.
func TestOurs(t *testing.T) {
	taken := 0
	r := newRig(t, func(c *Config) {
		c.Ours = func(b []byte) bool {
			ours := bytes.HasSuffix(b, []byte("ours"))
			if ours {
				taken++
			}
			return ours
		}
	})
	ours := pkttest.UDP("172.31.0.10:4000", "10.0.0.10:53", "ours")
	spoofed := pkttest.UDP("192.0.2.1:4000", "10.0.0.10:53", "ours")
	o, v := r.fromVPC(ours, pkttest.UDP("172.31.0.11:4000", "10.0.0.10:53", "question"), spoofed, []byte("ours"))
	if len(o) != 1 || len(v) != 0 || taken != 3 {
		t.Errorf("%d taken, to the overlay %q, to the VPC %q", taken, o, v)
	}
	in := &r.e.stats.traffic[VPCSide][rx]
	if n, size := in.packets.Load(), in.bytes.Load(); n != 1 || size != 28+8 {
		t.Errorf("%d packets of %d bytes are counted", n, size)
	}
	if len(r.e.Flows(FlowFilter{})) != 1 || len(r.e.Refusals()) != 0 {
		t.Errorf("%+v, %+v", r.e.Flows(FlowFilter{}), r.e.Refusals())
	}
	r.fromOverlay(pkttest.UDP("10.0.0.10:53", "10.0.0.1:4000", "ours"))
	if taken != 3 {
		t.Error("a packet of the overlay is taken")
	}
}
