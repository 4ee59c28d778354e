// Package config is the configuration: one table of settings from which flags,
// environment, file and `ztgate config show` follow.
package config

import (
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"ztgate/zerotier/ztnode"
)

// Defaults that other programs rely on too.
const (
	DefaultHome   = "/var/lib/ztgate"
	DefaultConfig = "/etc/ztgate/ztgate.yaml"
	DefaultSocket = "/run/ztgate/ztgate.sock"
	DefaultListen = "127.0.0.1:9002"
	DefaultPort   = 9993
	DefaultTUN    = "ztg0"
	DefaultMTU    = 2800
)

// Ways in for packets of the VPC.
const (
	IngressTUN    = "tun"
	IngressPacket = "packet"
	IngressAuto   = "auto" // until [Config.PickIngress]
)

// Config is the effective configuration. It is immutable: nobody changes it, or
// what its slices hold, once [Load] has returned it. [Config.Reload] and
// [Config.Resolve] make new ones.
type Config struct {
	Home, Socket, Listen string
	Node                 string // implementation of the node: go | libzt
	Port                 int
	Planet               string // path of a planet file, "" = built-in or the one in Home
	Controller           bool
	API                  APIConfig
	Webhook              WebhookConfig
	Exit                 bool // overlay hosts reach the internet
	LogLevel             slog.Level
	LogFormat            string // text | json
	IdentitySecret       string // text form, "" = the one in Home
	IdentityPublic       string
	Networks             []NetworkConfig
	Underlay             Underlay
	VPC                  VPCConfig
	NAT                  NATConfig
	Forwards             []Forward
	Maps                 []AddressMap
	Policy               PolicyConfig
	Targets              []Target
	DNS                  DNSConfig
	Warnings             []string // things that have no effect, for the log
	Unresolved           []string // what doesn't work as configured, since a name has no address yet

	origin  map[string]string
	sources Sources
	file    string // that was read, "" = none, or one without content
	noFile  bool   // on purpose
	written written
	moved   map[ztnode.NetworkID]NetworkConfig // what a home of zerotier-one says of networks that are named nowhere else
	answers map[string][]netip.Addr            // that the names were replaced by
	fitted  bool                               // by [Config.FitFlows]
	picked  bool                               // by [Config.PickIngress]
}

// APIConfig is the API of zerotier-one's local service over TCP.
type APIConfig struct {
	Listen    string // ADDRESS:PORT, "" = off
	AllowFrom []netip.Prefix
}

// WebhookConfig says who is told of nodes that ask our controller for a network.
type WebhookConfig struct {
	URL    string // "" = nobody
	Secret string // text form of the key that messages are signed with
}

// NetworkConfig is a network to join.
type NetworkConfig struct {
	ID          ztnode.NetworkID
	Masquerade  *bool // nil = nat.masquerade
	AllowGlobal bool  // accept managed routes and addresses of public IP space
	AllowDNS    bool  // ask its name servers for clients, for names in its domain
	// AllowDefault lets a member send all that has no other way through the network, if
	// its controller says so.
	AllowDefault bool
}

// VPCConfig is the side the clients are on.
type VPCConfig struct {
	Ingress    string // see [IngressTUN]
	IOUring    string // auto | off
	TUN        string
	Sources    []netip.Prefix // who may send; none = everybody
	Address    []netip.Prefix // of the gateway on the TUN, or of its probes
	MTU        int            // 0 = the interface's; of a TUN, the largest of the networks, at least [DefaultMTU]
	Interfaces []string       // where VPC packets come from; on a TUN checked only
	NAT        NATAddresses
}

// Sends reports whether an address may send into the overlay.
func (v *VPCConfig) Sends(a netip.Addr) bool {
	return len(v.Sources) == 0 || slices.ContainsFunc(v.Sources, func(p netip.Prefix) bool { return p.Contains(a) })
}

// NATAddresses are how VPC hosts see overlay hosts. The zero value means by their own
// addresses.
type NATAddresses struct {
	Addresses []netip.Addr // of the gateway in the VPC, at most one of a family
	Host      bool         // by this host's own address, in families without one of those
}

// NATConfig configures translation.
type NATConfig struct {
	Masquerade        bool           // IPv4
	Masquerade6       bool           // IPv6 too (NAT66)
	Exempt            []netip.Prefix // destinations that see clients' own addresses
	Addresses         []netip.Prefix // ours on the overlay that clients leave from, each client from one; none = the first
	MaxFlows          int
	MaxFlowsPerClient int // this and the following: 0 = the plane's default
	MaxPortsPerClient int
	MaxHalfOpen       int
	FlowRatePerClient int
	PortSharing       string        // none | by_destination
	Filtering         string        // address_and_port | endpoint_independent
	Pickup            bool          // TCP segments without SYN may open flows, after a restart
	WindowCheck       bool          // TCP segments must fit what the other side acknowledged and allows
	PortRest          time.Duration // how long a freed port is kept for its client
	Timeouts          Timeouts
}

// Timeouts are how long idle flows are kept.
type Timeouts struct {
	TCPEstablished, TCPTransitory, TCPOpening, TCPHalfClosed, TCPClosing, TCPReset, UDP, UDPUnanswered, ICMP time.Duration
}

// Side is a side of the gateway.
type Side string

// The two sides.
const (
	SideVPC     Side = "vpc"
	SideOverlay Side = "overlay"
)

// Forward forwards what comes to an address to a host of either side.
type Forward struct {
	Proto      string         // tcp | udp
	Listen     netip.AddrPort // an unspecified address stands for the gateway's overlay addresses
	To         netip.AddrPort
	Host       string // the name whose address To has; "" = it was given as an address
	Side       Side   // where clients come from
	Masquerade bool   // the host sees the gateway's address
	// ProxyProtocol is the version of the PROXY header by which the host is told who the
	// client is: v1 or v2, "" = none is sent.
	ProxyProtocol string
	// AcceptProxy are load balancers, which say by a PROXY header for whom a connection
	// is. Nobody else may use the forward then. None = no header is read.
	AcceptProxy []netip.Prefix
}

// Relayed reports a forward whose connections end in the gateway, which makes others to
// the host: a stream can't be given another beginning while packets pass.
func (f *Forward) Relayed() bool { return f.ProxyProtocol != "" || len(f.AcceptProxy) > 0 }

func (f Forward) String() string {
	listen, to := f.Listen.String(), f.To.String()
	if !f.Listen.Addr().IsValid() { // follows the family of the name's address
		listen = fmt.Sprint(f.Listen.Port())
	}
	if f.Host != "" {
		to = fmt.Sprintf("%s:%d", f.Host, f.To.Port())
		if a := f.To.Addr(); a.IsValid() {
			to += " (" + a.String() + ")"
		}
	}
	s := fmt.Sprintf("%s/%s to %s", f.Proto, listen, to)
	if !f.Masquerade {
		s += " with clients' addresses"
	}
	if f.ProxyProtocol != "" {
		s += " with PROXY " + f.ProxyProtocol
	}
	if len(f.AcceptProxy) > 0 {
		s += " behind " + strings.Join(texts(f.AcceptProxy), ",")
	}
	return s
}

// AddressMap gives hosts of one side other addresses on the other side.
type AddressMap struct {
	Network     ztnode.NetworkID // 0 = all
	Hosts       Side             // where the hosts are
	Real, Alias netip.Prefix
}

func (m AddressMap) String() string {
	s := fmt.Sprintf("%s hosts %s are %s", m.Hosts, m.Real, m.Alias)
	if m.Network != 0 {
		s += " in " + m.Network.String()
	}
	return s
}

// PolicyConfig is the list of rules, of which the first match wins.
type PolicyConfig struct {
	Default string // accept | drop | reject
	Allow   []Allow
	Rules   []PolicyRule // those of Allow are the first
}

// PolicyRule accepts or refuses new flows. Empty fields match everything.
type PolicyRule struct {
	Action    string
	Proto     string           // "" | tcp | udp | icmp
	From, To  []netip.Prefix   // with the addresses of the names
	Ports     []PortRange      // destination
	Direction string           // "" | out (from the VPC) | in
	Network   ztnode.NetworkID // 0 = all

	FromNames, ToNames []Named
}

// PortRange is inclusive.
type PortRange struct{ First, Last uint16 }

func (r PortRange) String() string {
	if r.First == r.Last {
		return fmt.Sprint(r.First)
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// Target is an overlay service whose reachability decides readiness.
type Target struct {
	Scheme string         // tcp | icmp
	Addr   netip.AddrPort // its address is invalid while a name has none
	Host   string         // the name; "" = it was given as an address
}

// String returns the target as it was written. It names a metric, which an address
// that changes must not change.
func (t Target) String() string {
	if t.Host != "" {
		s := t.Scheme + "://" + t.Host
		if t.Addr.Port() != 0 {
			s += fmt.Sprintf(":%d", t.Addr.Port())
		}
		return s
	}
	if t.Scheme == "icmp" {
		return "icmp://" + t.Addr.Addr().String()
	}
	return t.Scheme + "://" + t.Addr.String()
}

// NetworkIDs lists the networks to join.
func (c *Config) NetworkIDs() []ztnode.NetworkID {
	out := make([]ztnode.NetworkID, len(c.Networks))
	for i, n := range c.Networks {
		out[i] = n.ID
	}
	return out
}

// Network returns the options of a network, which may have been joined at run
// time and then has the defaults.
func (c *Config) Network(id ztnode.NetworkID) NetworkConfig {
	for _, n := range c.Networks {
		if n.ID == id {
			return n
		}
	}
	if n, ok := c.moved[id]; ok {
		return n
	}
	return NetworkConfig{ID: id}
}

// ByHost reports whether overlay hosts may go on by sockets of this host.
func (c *Config) ByHost() bool { return c.VPC.NAT.Host || c.Exit && len(c.VPC.NAT.Addresses) == 0 }

// AllowsDefault reports whether a default route may be taken.
func (c *Config) AllowsDefault() bool {
	allows := func(n NetworkConfig) bool { return n.AllowDefault }
	return slices.ContainsFunc(c.Networks, allows) || slices.ContainsFunc(slices.Collect(maps.Values(c.moved)), allows)
}

// Masquerade says whether clients' addresses are hidden in a network.
func (c *Config) Masquerade(id ztnode.NetworkID) bool {
	if m := c.Network(id).Masquerade; m != nil {
		return *m
	}
	return c.NAT.Masquerade
}

// Value is one line of the effective configuration.
type Value struct {
	Key    string `json:"key"`
	Value  any    `json:"value"`
	Origin string `json:"origin"`
}

// Key is a key of the configuration file.
type Key struct {
	Name    string
	Section string // that lists the record it belongs to, "" = none
	Live    bool   // a running gateway takes a change
}

// Keys lists all keys of the file that have a value.
func Keys() (out []Key) {
	for _, s := range settings {
		out = append(out, Key{Name: s.key, Live: s.live})
	}
	for _, part := range sections {
		for _, k := range part.keys() {
			out = append(out, Key{k, part.name(), part.isLive()})
		}
	}
	return out
}

// Values returns the effective configuration with the origin of every value.
// Secrets are not shown.
func (c *Config) Values() []Value {
	var out []Value
	for _, s := range settings {
		var v any = s.get(c)
		if !s.list {
			v = strings.Join(s.get(c), ",")
		}
		if s.secret && v != "" {
			v = "(secret)"
		}
		out = append(out, Value{s.key, v, c.Origin(s.key)})
	}
	for _, n := range c.Networks {
		key := "networks." + n.ID.String()
		out = append(out,
			Value{key + ".masquerade", c.Masquerade(n.ID), c.Origin(key + ".masquerade")},
			Value{key + ".allow_global", n.AllowGlobal, c.Origin(key + ".allow_global")},
			Value{key + ".allow_dns", n.AllowDNS, c.Origin(key + ".allow_dns")},
			Value{key + ".allow_default", n.AllowDefault, c.Origin(key + ".allow_default")})
	}
	for _, part := range sections {
		if part == networkRecords {
			continue // shown key by key above
		}
		list, first := part.texts(c), 0
		if part == ruleRecords {
			list, first = texts(c.writtenRules()), len(c.Policy.Allow)
		}
		for i, text := range list {
			origin := c.Origin(part.name())
			if i < first {
				origin = c.Origin("policy.allow")
			}
			out = append(out, Value{fmt.Sprintf("%s[%d]", part.name(), i), text, origin})
		}
	}
	return out
}

// File returns the path of the configuration file that was read, "" if there was none
// with anything in it, and whether the operator wanted none.
func (c *Config) File() (path string, none bool) { return c.file, c.noFile }

// Origin says where the value of a key came from.
func (c *Config) Origin(key string) string {
	if o := c.origin[key]; o != "" {
		return o
	}
	return "default"
}

func (r PolicyRule) String() string {
	parts := []string{r.Action}
	add := func(name string, list []string) {
		if len(list) > 0 {
			parts = append(parts, name+" "+strings.Join(list, ","))
		}
	}
	if r.Proto != "" {
		add("proto", []string{r.Proto})
	}
	add("from", writtenPrefixes(r.From, r.FromNames))
	add("to", writtenPrefixes(r.To, r.ToNames))
	add("ports", texts(r.Ports))
	if r.Direction != "" {
		add("direction", []string{r.Direction})
	}
	if r.Network != 0 {
		add("network", []string{r.Network.String()})
	}
	return strings.Join(parts, " ")
}

func texts[T fmt.Stringer](list []T) []string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = v.String()
	}
	return out
}

// check finds contradictions between values that are fine by themselves.
func (c *Config) check() []error {
	var errs []error
	bad := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s (from %s): %s", key, c.Origin(key), fmt.Sprintf(format, args...)))
	}
	if c.Home == "" {
		bad("home", "is empty: give a directory")
	}
	switch c.VPC.Ingress {
	case IngressTUN, IngressAuto:
	case IngressPacket:
		if len(c.VPC.Interfaces) != 1 {
			bad("vpc.ingress", "packet takes packets from one interface: name it in vpc.interfaces (--interface)")
		}
	case "geneve":
		bad("vpc.ingress", "%q is not supported yet: use tun, packet or auto", c.VPC.Ingress)
	default:
		bad("vpc.ingress", "%q is unknown: use tun, packet or auto", c.VPC.Ingress)
	}
	if !validInterface(c.VPC.TUN) {
		bad("vpc.tun", "%q is no interface name: use up to 15 characters without spaces, '/' or ':'", c.VPC.TUN)
	}
	var seen []ztnode.NetworkID
	for _, n := range c.Networks {
		if slices.Contains(seen, n.ID) {
			bad("networks", "%s is listed twice: remove one", n.ID)
		}
		seen = append(seen, n.ID)
	}
	if n := len(c.Networks); n > ztnode.MaxNetworks {
		bad("networks", "%d are too many: a node can be in %d", n, ztnode.MaxNetworks)
	}
	if c.IdentityPublic != "" && c.IdentitySecret == "" {
		bad("identity.public", "is of no use without identity.secret: give both or none")
	}
	for _, problem := range c.checkWebhook() {
		bad(problem.key, "%s", problem.text)
	}
	for i, r := range c.written.rules {
		if len(r.Ports) > 0 && r.Proto != "tcp" && r.Proto != "udp" {
			bad("policy.rules", "rule %d has ports but proto %q: set proto to tcp or udp", i, r.Proto)
		}
	}
	c.checkDNS(bad)
	if n := addressesIn(c.NAT.Addresses); n > MaxNATAddresses {
		bad("nat.addresses", "more than %d addresses: leave some out", MaxNATAddresses)
	}
	if n := len(c.written.targets); n > maxTargets {
		bad("targets", "%d are too many: give at most %d", n, maxTargets)
	}
	return errs
}

const maxTargets = 64

// MaxNATAddresses is how many addresses clients may leave from: the ports of each take up to
// 2 MB for each of TCP, UDP and pings.
const MaxNATAddresses = 64

// addressesIn counts the addresses of prefixes, as far as they matter.
func addressesIn(list []netip.Prefix) (n int) {
	for _, p := range list {
		n += 1 << min(p.Addr().BitLen()-p.Bits(), 16)
	}
	return n
}

func validInterface(s string) bool {
	return s != "" && len(s) <= 15 && s != "." && s != ".." && !strings.ContainsAny(s, "/: \t\n%")
}
