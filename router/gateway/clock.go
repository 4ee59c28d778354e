package gateway

import (
	"fmt"
	"sync"
	"time"

	"ztgate/router/control"
)

const (
	// clockStep is a change of the clock that certificates and timers of members mind.
	clockStep = 10 * time.Second
	// clockSettles is how long after a change certificates may be off.
	clockSettles = 10 * time.Minute
)

// clockWatch notices that the host's clock was set. The zero value is ready for use.
type clockWatch struct {
	mu     sync.Mutex
	last   time.Time // with its monotonic reading
	jumped time.Time
	step   time.Duration // positive = it was set forward
}

// look compares the two readings that a time from time.Now has.
func (c *clockWatch) look(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.last.IsZero() {
		c.note(now, now.Round(0).Sub(c.last.Round(0)), now.Sub(c.last))
	}
	c.last = now
}

// note takes how much time went by on the wall and really. A machine that slept looks
// the same as a clock that was set forward.
func (c *clockWatch) note(now time.Time, wall, real time.Duration) {
	if step := wall - real; step.Abs() >= clockStep {
		c.jumped, c.step = now, step
	}
}

func (c *clockWatch) check(now time.Time) control.Check {
	const name = "clock"
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.jumped.IsZero() || now.Sub(c.jumped) >= clockSettles {
		return control.Passed(name)
	}
	return control.Failed(name, control.Degraded, fmt.Sprintf("the clock jumped by %v at %s", c.step.Round(time.Second), clockTime(c.jumped)),
		"members may refuse certificates of another time: see that a time service keeps the clock")
}
