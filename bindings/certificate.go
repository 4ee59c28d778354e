//go:build libzt

package bindings

import (
	"bytes"
	"sync"
	"time"

	"ztgate/zerotier/vl2"
	"ztgate/zerotier/ztnode"
)

// certificates knows when our certificates end, which the core doesn't tell. It reads
// each configuration once.
type certificates struct {
	mu    sync.Mutex
	known map[ztnode.NetworkID]certificate
}

// certificate is the end of a network's certificate, and the configuration it comes
// from.
type certificate struct {
	of   []byte
	ends time.Time
}

// expiry returns the end of our certificate in a signed configuration (chapter 03 §1);
// zero without one.
func (c *certificates) expiry(id ztnode.NetworkID, dictionary []byte) time.Time {
	if len(dictionary) <= 1 {
		dictionary = nil // joined, without a configuration yet
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	x := c.known[id]
	if bytes.Equal(x.of, dictionary) {
		return x.ends
	}
	x = certificate{of: dictionary}
	if cfg, err := vl2.DecodeNetworkConfig(dictionary); err == nil && cfg.COM != nil {
		x.ends = time.UnixMilli(cfg.COM.Timestamp() + cfg.COM.TimeDelta())
	}
	c.known[id] = x
	return x.ends
}

func (c *certificates) forget(id ztnode.NetworkID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.known, id)
}
