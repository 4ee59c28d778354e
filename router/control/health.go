package control

import (
	"cmp"
	"slices"
	"strings"

	"ztgate/router/fault"
)

// State is what a process is to its clients, the best first.
type State string

// States.
const (
	Ready    State = "ready"    // clients are served
	Degraded State = "degraded" // they are, but something needs a hand
	Down     State = "down"     // some aren't
)

// States lists the states.
func States() [3]State { return [...]State{Ready, Degraded, Down} }

func (s State) rank() int {
	all := States()
	return slices.Index(all[:], s)
}

// Check is one part of health.
type Check struct {
	Name     string `json:"name"`
	OK       bool   `json:"ok"`
	Severity State  `json:"severity,omitempty"` // what the process is because of it; empty if passed
	Reason   string `json:"reason,omitempty"`   // what is wrong
	Remedy   string `json:"remedy,omitempty"`   // what to do about it
}

// Passed is a check that found nothing.
func Passed(name string) Check { return Check{Name: name, OK: true} }

// Failed is a check that found something.
func Failed(name string, severity State, reason, remedy string) Check {
	return Check{Name: name, Severity: severity, Reason: reason, Remedy: remedy}
}

// String returns what is wrong and what to do about it, "" for nothing.
func (c Check) String() string {
	if c.Reason == "" || c.Remedy == "" {
		return c.Reason
	}
	return c.Reason + ": " + c.Remedy
}

// Word is what people read of a check.
func (c Check) Word() string {
	if c.OK {
		return "ok"
	}
	return string(c.Severity)
}

// Health says whether clients are served and what is wrong.
type Health struct {
	Schema  int      `json:"schema"`
	State   State    `json:"state,omitempty"`
	Online  bool     `json:"online"`
	Ready   bool     `json:"ready"`   // ready or degraded
	Reasons []string `json:"reasons"` // of all checks that failed, the worst first
	Checks  []Check  `json:"checks"`
}

// NewHealth sums checks up.
func NewHealth(online bool, checks []Check) Health {
	h := Health{Schema: Schema, State: Ready, Online: online, Reasons: []string{}, Checks: checks}
	for _, c := range h.Failed() {
		h.Reasons = append(h.Reasons, c.String())
		if c.Severity.rank() > h.State.rank() {
			h.State = c.Severity
		}
	}
	h.Ready = h.State != Down
	return h
}

// Failed lists the checks that failed, the worst first.
func (h Health) Failed() []Check {
	list := slices.DeleteFunc(slices.Clone(h.Checks), func(c Check) bool { return c.OK })
	slices.SortStableFunc(list, func(a, b Check) int { return cmp.Compare(b.Severity.rank(), a.Severity.rank()) })
	return list
}

// Err returns nil if clients are served.
func (h Health) Err() error {
	if h.Ready {
		return nil
	}
	return fault.NotReady("not ready: %s", strings.Join(h.Reasons, "; "))
}

func (h Health) reason(check string) string {
	for _, c := range h.Checks {
		if c.Name == check {
			return c.String()
		}
	}
	return ""
}
