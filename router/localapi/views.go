package localapi

import (
	"fmt"
	"math"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"ztgate/router/control"
	"ztgate/zerotier/ztnode"
)

// version is a version as all objects have it; unknown numbers are -1.
type version struct {
	Text  string `json:"version"`
	Major int    `json:"versionMajor"`
	Minor int    `json:"versionMinor"`
	Rev   int    `json:"versionRev"`
}

func versionOf(text string) version {
	parts := strings.Split(text, ".")
	n := [3]int{-1, -1, -1}
	for i := range n {
		v, err := strconv.Atoi(parts[min(i, len(parts)-1)])
		if err != nil || len(parts) != len(n) {
			return version{"-1.-1.-1", -1, -1, -1}
		}
		n[i] = v
	}
	return version{text, n[0], n[1], n[2]}
}

// status is /status (chapter 04 §15.3).
type status struct {
	Address  string `json:"address"`
	Identity string `json:"publicIdentity"`
	health
	TCPFallback     bool         `json:"tcpFallbackActive"`
	PlanetID        uint64       `json:"planetWorldId"`
	PlanetTimestamp int64        `json:"planetWorldTimestamp"`
	Config          statusConfig `json:"config"`
}

// health is /health.
type health struct {
	Online bool `json:"online"`
	version
	Build int   `json:"versionBuild"`
	Clock int64 `json:"clock"`
}

type statusConfig struct {
	Settings settings `json:"settings"`
}

// settings are those that the reference shows. ztgate neither updates itself nor takes
// the relay where UDP works.
type settings struct {
	AllowManagementFrom   []string `json:"allowManagementFrom"`
	AllowTCPFallbackRelay bool     `json:"allowTcpFallbackRelay"`
	ForceTCPRelay         bool     `json:"forceTcpRelay"`
	HomeDir               string   `json:"homeDir"`
	ListeningOn           []string `json:"listeningOn"`
	PortMapping           bool     `json:"portMappingEnabled"`
	PrimaryPort           int      `json:"primaryPort"`
	SecondaryPort         int      `json:"secondaryPort"`
	SoftwareUpdate        string   `json:"softwareUpdate"`
	UpdateChannel         string   `json:"softwareUpdateChannel"`
	SurfaceAddresses      []string `json:"surfaceAddresses"`
	TertiaryPort          int      `json:"tertiaryPort"`
}

func (a *API) health(i control.Info) health {
	return health{Online: i.Online, version: versionOf(i.Version), Clock: a.Now().UnixMilli()}
}

func (a *API) status(i control.Info) status {
	from := []string{}
	for _, p := range a.AllowFrom {
		from = append(from, fmt.Sprintf("%s/%d", p.Addr(), p.Bits()))
	}
	return status{Address: i.Address, Identity: i.Identity, health: a.health(i), PlanetID: i.PlanetID, PlanetTimestamp: i.PlanetTimestamp,
		Config: statusConfig{settings{AllowManagementFrom: from, AllowTCPFallbackRelay: a.TCPRelay, HomeDir: i.Home, ListeningOn: slashed(i.Listening),
			PortMapping: i.PortMapping, PrimaryPort: i.PrimaryPort, SecondaryPort: i.SecondaryPort, SoftwareUpdate: "disable", UpdateChannel: "release",
			SurfaceAddresses: slashed(i.Surface), TertiaryPort: i.TertiaryPort}}}
}

// slashed writes endpoints as the reference does, "ip/port".
func slashed(list []netip.AddrPort) []string {
	out := make([]string, len(list))
	for i, ep := range list {
		out[i] = slash(ep)
	}
	return out
}

func slash(ep netip.AddrPort) string { return fmt.Sprintf("%s/%d", ep.Addr().Unmap(), ep.Port()) }

// peer is one of /peer (§15.5).
type peer struct {
	Address string `json:"address"`
	Bonded  bool   `json:"isBonded"`
	Latency int    `json:"latency"` // ms; -1 = unknown, or by a root
	Paths   []path `json:"paths"`
	Role    string `json:"role"`
	Tunnel  bool   `json:"tunneled"`
	version
}

type path struct {
	Active      bool   `json:"active"`
	Address     string `json:"address"`
	Expired     bool   `json:"expired"`
	LastReceive int64  `json:"lastReceive"`
	LastSend    int64  `json:"lastSend"`
	LocalPort   int    `json:"localPort"`
	LocalSocket int    `json:"localSocket"`
	Preferred   bool   `json:"preferred"`
	TrustedPath int    `json:"trustedPathId"`
}

// peerView is a peer as front ends tell whether a member is online: by its being
// listed, by its latency, which one has that is reached directly, and by its version.
func peerView(p ztnode.Peer) peer {
	v := peer{Address: p.Address, Latency: -1, Paths: []path{}, Role: p.Role, version: versionOf(p.Version)}
	if p.Relayed {
		return v
	}
	if p.Latency >= 0 {
		v.Latency = int(math.Round(p.Latency))
	}
	for _, x := range p.Paths {
		v.Paths = append(v.Paths, path{Active: !x.Expired, Address: slash(x.Endpoint), Expired: x.Expired, Preferred: x.Preferred,
			LastSend: milliseconds(x.LastSend), LastReceive: milliseconds(x.LastReceive)})
	}
	return v
}

func milliseconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

// network is one of /network (§15.4).
type network struct {
	ID            string         `json:"id"`
	NetworkID     string         `json:"nwid"`
	Name          string         `json:"name"`
	MAC           ztnode.MAC     `json:"mac"`
	Status        string         `json:"status"`
	Type          string         `json:"type"`
	MTU           int            `json:"mtu"`
	DHCP          bool           `json:"dhcp"`
	Bridge        bool           `json:"bridge"`
	Broadcast     bool           `json:"broadcastEnabled"`
	PortError     int            `json:"portError"`
	Revision      uint64         `json:"netconfRevision"`
	Device        string         `json:"portDeviceName"`
	AllowManaged  bool           `json:"allowManaged"`
	AllowGlobal   bool           `json:"allowGlobal"`
	AllowDefault  bool           `json:"allowDefault"`
	AllowDNS      bool           `json:"allowDNS"`
	Addresses     []netip.Prefix `json:"assignedAddresses"`
	Routes        []route        `json:"routes"`
	Subscriptions []string       `json:"multicastSubscriptions"`
	DNS           dns            `json:"dns"`
}

type route struct {
	Target netip.Prefix `json:"target"`
	Via    *netip.Addr  `json:"via"`
	Flags  int          `json:"flags"`
	Metric int          `json:"metric"`
}

type dns struct {
	Domain  string       `json:"domain"`
	Servers []netip.Addr `json:"servers"`
}

func networkView(n control.NetworkView, allowed Allowed) network {
	v := network{ID: n.ID.String(), NetworkID: n.ID.String(), Name: n.Name, MAC: n.MAC, Status: n.Status, Type: n.Type, MTU: n.MTU, Bridge: n.Bridge,
		Broadcast: n.Broadcast, Revision: n.Revision, Device: n.Device, AllowManaged: true, AllowGlobal: allowed.Global, AllowDefault: allowed.Default,
		Addresses: append([]netip.Prefix{}, n.Addresses...), Routes: []route{}, Subscriptions: []string{},
		DNS: dns{n.DNSDomain, append([]netip.Addr{}, n.DNSServers...)}}
	for _, r := range n.Routes {
		x := route{Target: r.Target}
		if r.Via.IsValid() {
			x.Via = &r.Via
		}
		v.Routes = append(v.Routes, x)
	}
	return v
}
