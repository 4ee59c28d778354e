package control

import (
	"net/netip"
	"time"

	"ztgate/zerotier/ztnode"
)

// Drop is packets that were dropped for one reason, from one source to one destination.
type Drop struct {
	Reason      string           `json:"reason"`  // as in the metrics
	Meaning     string           `json:"meaning"` // one sentence
	Remedy      string           `json:"remedy,omitempty"`
	Side        string           `json:"side"` // vpc or overlay: where they came from
	Network     ztnode.NetworkID `json:"network,omitzero"`
	Member      string           `json:"member,omitempty"` // that they came from
	Protocol    string           `json:"protocol,omitempty"`
	Source      netip.AddrPort   `json:"source,omitzero"` // of the last one
	Destination netip.AddrPort   `json:"destination,omitzero"`
	First       time.Time        `json:"first"`
	Last        time.Time        `json:"last"`
	Count       uint64           `json:"count"` // that were looked at: under a flood not all are
}

// Drops lists the last ones, the latest first.
type Drops struct {
	Schema int    `json:"schema"`
	Drops  []Drop `json:"drops"`
}
