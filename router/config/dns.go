package config

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"ztgate/zerotier/ztnode"
)

// DNSConfig is the name server for clients.
type DNSConfig struct {
	Listen    []netip.AddrPort // none = off
	Zone      string           // that the names of the networks' hosts lie in
	Upstreams []netip.AddrPort // are asked for what no network knows
	Rate      int              // questions a second of one client
	Hosts     []DNSHost
}

// DNSHost gives a host of a network a name in the zone.
type DNSHost struct {
	Name      string // a single label
	Network   ztnode.NetworkID
	Addresses []netip.Addr
}

func (h DNSHost) String() string {
	return fmt.Sprintf("%s in %s is %s", h.Name, h.Network, strings.Join(texts(h.Addresses), " "))
}

const (
	defaultZone = "zt.internal" // .internal is nobody's (ICANN, 2024)
	// maxZone leaves room for the labels of a host and a network.
	maxZone    = 120
	maxDNSHost = 4096
	dnsPort    = 53
)

// dnsSettings are those of the name server.
func dnsSettings() []*setting {
	return []*setting{
		live(list("dns.listen", "", "", nil, parseDNSListen, func(c *Config) *[]netip.AddrPort { return &c.DNS.Listen })),
		live(scalar("dns.zone", "", "", defaultZone, func(c *Config, v string) error {
			name, err := parseName(v)
			if err == nil && len(name) > maxZone {
				err = fmt.Errorf("is longer than %d characters", maxZone)
			}
			c.DNS.Zone = name
			return err
		}, func(c *Config) string { return c.DNS.Zone })),
		live(list("dns.upstreams", "", "", nil, parseNameServer, func(c *Config) *[]netip.AddrPort { return &c.DNS.Upstreams })),
		live(number("dns.rate_per_client", "", "", 100, 1, 1000000, func(c *Config) *int { return &c.DNS.Rate })),
	}
}

// parseDNSListen reads an address of this host, with a port or without.
func parseDNSListen(s string) (netip.AddrPort, error) {
	at, err := parseNameServer(s)
	switch a := at.Addr(); {
	case err != nil:
	case a.IsUnspecified():
		err = errors.New("give the addresses of this host that clients ask, one by one")
	case a.IsLoopback():
		err = errors.New("clients can't reach it: give an address of this host in the VPC, as in 172.31.0.5")
	}
	return at, err
}

// parseNameServer reads ADDRESS or ADDRESS:PORT.
func parseNameServer(s string) (netip.AddrPort, error) {
	at, err := netip.ParseAddrPort(s)
	if err != nil {
		var a netip.Addr
		if a, err = netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
			at = netip.AddrPortFrom(a, dnsPort)
		}
	}
	if err != nil || at.Port() == 0 || at.Addr().Zone() != "" || at.Addr().IsMulticast() {
		return netip.AddrPort{}, errors.New("give ADDRESS or ADDRESS:PORT, as in 172.31.0.5 or [fd00::5]:53")
	}
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port()), nil
}

var dnsHostRecords = &record[DNSHost]{
	key: "dns.hosts", example: `{name: db, network: "8056c2e21c000001", addresses: [10.0.0.10]}`, live: true, max: maxDNSHost,
	fields: []field[DNSHost]{
		one("name", parseLabel, func(h *DNSHost, v string) { h.Name = v }),
		one("network", parseNetwork, func(h *DNSHost, v ztnode.NetworkID) { h.Network = v }),
		many("addresses", parseHostAddress, func(h *DNSHost, v []netip.Addr) { h.Addresses = v }),
	},
	check: func(h *DNSHost) error {
		if h.Name == "" || h.Network == 0 || len(h.Addresses) == 0 {
			return errors.New("an entry needs name, network and addresses")
		}
		return nil
	},
	list: func(c *Config) *[]DNSHost { return &c.DNS.Hosts },
	text: func(_ *Config, h DNSHost) string { return h.String() },
}

func parseLabel(s string) (string, error) {
	if strings.Contains(s, ".") {
		return "", errors.New("give the name alone, without dots: its network and the zone follow")
	}
	if label, err := parseName(s + ".a"); err == nil { // it may be all digits
		return strings.TrimSuffix(label, ".a"), nil
	}
	return "", errors.New("give a name of letters, digits and hyphens")
}

func parseHostAddress(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return a, errors.New("give an address, as in 10.0.0.10")
	}
	return a.Unmap(), nil
}

// checkDNS finds what would make the name server one for everybody, or ask itself.
func (c *Config) checkDNS(bad func(key, format string, args ...any)) {
	if len(c.DNS.Listen) > 0 && (len(c.VPC.Sources) == 0 || slices.ContainsFunc(c.VPC.Sources, func(p netip.Prefix) bool { return p.Bits() == 0 })) {
		bad("dns.listen", "everybody would be answered: say who belongs to the VPC with vpc.sources (--source)")
	}
	for _, u := range c.DNS.Upstreams {
		if slices.Contains(c.DNS.Listen, u) {
			bad("dns.upstreams", "%s is where this gateway itself answers: give another server", u)
		}
	}
}
