package vl1

import "time"

// sayAgain is how often the log says the same.
const sayAgain = 10 * time.Minute

// twin is what is known of another node in our place.
type twin struct {
	at, said int64
}

// Collision returns when a root last said that another identity uses our address; the
// zero value for never. A second node with our very identity is noticed by the layer above.
// It must not be asked for: a root of the reference that is given a packet from our own
// address to it stops for good.
func (c *Core) Collision() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.timeOf(c.twin.at)
}

// seeTwinLocked notes that a root knows our address by another identity.
func (c *Core) seeTwinLocked(t int64) {
	if c.twin.said == 0 || since(t, c.twin.said) >= sayAgain {
		c.twin.said = t
		c.log.Error("another node uses the address of our identity; this node is not reachable until one of them gets a new identity", "address", c.self)
	}
	c.twin.at = t
}
