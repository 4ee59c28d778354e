package control

import (
	"net/netip"

	"ztgate/zerotier/ztnode"
)

// MaxFlows bounds an answer; the table itself may be far larger.
const MaxFlows = 10000

// FlowFilter selects flows.
type FlowFilter struct {
	To, From netip.Prefix     // invalid = all
	Protocol string           // "" = all
	State    string           // "" = all
	Network  ztnode.NetworkID // 0 = all
	Top      int              // the busiest only; 0 = all
}

// Flow is a live entry of the flow table.
type Flow struct {
	Protocol      string           `json:"protocol"`
	State         string           `json:"state"`
	Network       ztnode.NetworkID `json:"network"`
	Direction     string           `json:"direction"`
	Source        netip.AddrPort   `json:"source"`
	Destination   netip.AddrPort   `json:"destination"`
	Translated    netip.AddrPort   `json:"translatedSource"`
	TranslatedDst netip.AddrPort   `json:"translatedDestination"`
	AgeSeconds    float64          `json:"ageSeconds"`
	IdleSeconds   float64          `json:"idleSeconds"`
	BytesOut      uint64           `json:"bytesOut"`
	BytesIn       uint64           `json:"bytesIn"`
	PacketsOut    uint64           `json:"packetsOut"`
	PacketsIn     uint64           `json:"packetsIn"`
	// Relayed connections end in the gateway, which makes others to the host. Their packets
	// aren't counted.
	Relayed bool       `json:"relayed,omitempty"`
	Behind  netip.Addr `json:"behind,omitzero"` // the load balancer that says who the source is
}
