package control

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"ztgate/router/config"
	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

// Schema is the version of the JSON that the control API answers with. New
// fields don't change it; a changed or removed one does.
const Schema = 1

// Modes of the process.
const (
	ModeGateway = "gateway"
	ModeMember  = "member"
	ModeNode    = "node" // a root or controller without any interface
)

// Info is the node, as `zerotier-cli info` has it, and the process around it.
type Info struct {
	Schema int `json:"schema"`
	ztnode.Info
	Mode    string    `json:"mode"`
	Home    string    `json:"homeDir"`
	Started time.Time `json:"started"`
	Build   Build     `json:"build"`
}

// State returns ZeroTier's word for the state of the node.
func (i Info) State() string {
	if i.Online {
		return "ONLINE"
	}
	return "OFFLINE"
}

// NetworkView is a joined network and what became of it on this host.
type NetworkView struct {
	ztnode.Network
	Device   string   `json:"portDeviceName,omitempty"`
	Problems []string `json:"problems,omitempty"` // routes not installed, and why
}

// Networks lists the joined networks.
type Networks struct {
	Schema   int           `json:"schema"`
	Networks []NetworkView `json:"networks"`
}

// Peers lists the known peers.
type Peers struct {
	Schema int           `json:"schema"`
	Peers  []ztnode.Peer `json:"peers"`
}

// Flows lists entries of the flow table.
type Flows struct {
	Schema int    `json:"schema"`
	Total  int    `json:"total"` // matching, before the list was cut
	Limit  int    `json:"limit"`
	Flows  []Flow `json:"flows"`
}

// TargetState is the last result of probing a target.
type TargetState struct {
	Target     string    `json:"target"`
	Up         bool      `json:"up"`
	ConnectMS  float64   `json:"connectMilliseconds,omitempty"`
	LastChange time.Time `json:"lastChange,omitzero"`
	Error      string    `json:"error,omitempty"`
	Member     string    `json:"member,omitempty"`     // that answered last
	Path       string    `json:"path,omitempty"`       // DIRECT, RELAY or NONE: the way to it now
	Through    string    `json:"through,omitempty"`    // kernel = as a client's packets; ingress = as those, from where they are read; plane = from behind the interface
	PolicyNote string    `json:"policyNote,omitempty"` // what the policy has against clients that go there
}

// NameState is what is known of a name in the configuration.
type NameState struct {
	Name       string       `json:"name"`
	Addresses  []netip.Addr `json:"addresses"`
	LastAnswer time.Time    `json:"lastAnswer,omitzero"`
	Error      string       `json:"error,omitempty"`    // of the last lookup; the addresses of the last answer stay
	Failures   int          `json:"failures,omitempty"` // lookups in a row
}

// Status is one screen.
type Status struct {
	Schema   int           `json:"schema"`
	Info     Info          `json:"info"`
	Health   Health        `json:"health"`
	Networks []NetworkView `json:"networks"`
	Targets  []TargetState `json:"targets"`
	Names    []NameState   `json:"names,omitempty"`
	Peers    PeerCounts    `json:"peers"`
	Problems []string      `json:"problems,omitempty"` // of the configuration; those of a network stand there
	Drops    []Drop        `json:"drops,omitempty"`    // the last few
	Flows    int           `json:"flows"`
	Limit    int           `json:"flowsLimit"`

	Ingress     *Ingress  `json:"ingress,omitempty"`          // of a gateway
	SeenAs      []string  `json:"seenAs,omitempty"`           // what overlay hosts are masqueraded as in the VPC: addresses, and host for this host's own
	Writes      *Writes   `json:"writes,omitempty"`           // nil = there are no interfaces
	MemoryLimit int64     `json:"memoryLimitBytes,omitempty"` // of the runtime; 0 = none
	Limited     []Limited `json:"limited,omitempty"`
	DNS         *DNS      `json:"dns,omitempty"`     // nil = clients' questions for names aren't answered
	Relayed     *Relayed  `json:"relayed,omitempty"` // nil = nothing is
	Exits       []Exit    `json:"exits,omitempty"`   // of a member
}

// Exit is a member that carries what has no other way, of one family.
type Exit struct {
	Network   ztnode.NetworkID `json:"network"`
	Via       netip.Addr       `json:"via"`
	Interface string           `json:"interface"`
	InForce   bool             `json:"inForce"` // else it hasn't worked yet
	Up        bool             `json:"up"`
}

func (e Exit) String() string {
	s := "not in force yet"
	switch {
	case e.InForce && e.Up:
		s = "in force"
	case e.InForce:
		s = "in force, but the exit doesn't answer"
	}
	return fmt.Sprintf("%s in network %s, %s", e.Via, e.Network, s)
}

// Ingress is how packets of the VPC come in.
type Ingress struct {
	Kind      string `json:"kind"` // tun or packet
	Interface string `json:"interface"`
	From      string `json:"from"` // where that was said, or why it was picked
}

func (i *Ingress) String() string { return fmt.Sprintf("%s, %s (%s)", i.Kind, i.Interface, i.From) }

// Writes is how packets are written to this host's interfaces.
type Writes struct {
	Method string `json:"method"`           // io_uring or writev
	Reason string `json:"reason,omitempty"` // why not by io_uring
}

func (w *Writes) String() string {
	if w.Reason == "" {
		return "by " + w.Method
	}
	return "by " + w.Method + ", since " + w.Reason
}

// Limited is a client that was refused for what it has already.
type Limited struct {
	Client  netip.Prefix `json:"client"` // an address, or an IPv6 /64
	What    string       `json:"what"`   // it wanted
	Refused uint64       `json:"refused"`
}

// Relayed is what ends in the gateway and is carried on into the overlay.
type Relayed struct {
	Connections int             `json:"connections"` // and UDP sessions
	Clients     []RelayedClient `json:"clients"`     // those with most
	All         int             `json:"allClients"`  // how many there are
}

// RelayedClient is a client whose connections are relayed.
type RelayedClient struct {
	Client      netip.Addr `json:"client"`
	Behind      netip.Addr `json:"behind,omitzero"` // the load balancer that says so
	Connections int        `json:"connections"`
}

func (r *Relayed) String() string {
	out := make([]string, 0, len(r.Clients))
	for _, c := range r.Clients {
		text := fmt.Sprintf("%d of %s", c.Connections, c.Client)
		if c.Behind.IsValid() {
			text += " behind " + c.Behind.String()
		}
		out = append(out, text)
	}
	if more := r.All - len(r.Clients); more > 0 {
		out = append(out, fmt.Sprintf("and those of %d more", more))
	}
	return strings.Join(out, ", ")
}

// PeerCounts says how peers are reached.
type PeerCounts struct {
	Total  int `json:"total"`
	Direct int `json:"direct"`
	Relay  int `json:"relay"`
	None   int `json:"none"`
}

// PingRequest asks for one ping through the overlay; with a port, a TCP connect.
type PingRequest struct {
	Host      string `json:"host"`
	Port      int    `json:"port,omitempty"`
	TimeoutMS int    `json:"timeoutMilliseconds,omitempty"`
}

// Ping is its answer.
type Ping struct {
	Schema  int        `json:"schema"`
	Address netip.Addr `json:"address"`
	Port    int        `json:"port,omitempty"`
	Network string     `json:"network,omitempty"` // that the address belongs to
	Peer    string     `json:"peer,omitempty"`    // that the frames go to, if known
	Path    string     `json:"path,omitempty"`    // DIRECT or RELAY, if known
	MS      float64    `json:"milliseconds"`
}

// Configuration is the effective configuration.
type Configuration struct {
	Schema   int            `json:"schema"`
	Values   []config.Value `json:"values"`
	Warnings []string       `json:"warnings,omitempty"`
}

// ErrorView is the answer when something failed.
type ErrorView struct {
	Schema int         `json:"schema"`
	Error  ErrorDetail `json:"error"`
}

// ErrorDetail is what went wrong.
type ErrorDetail struct {
	Kind    fault.Kind `json:"kind"`
	Message string     `json:"message"`
}

// NewErrorView wraps an error for JSON output.
func NewErrorView(err error) ErrorView {
	return ErrorView{Schema, ErrorDetail{fault.KindOf(err), err.Error()}}
}
