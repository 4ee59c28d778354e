package host

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ztgate/router/plan"
)

// Proxy makes the kernel answer ARP and neighbour discovery for addresses that are routed
// to us. It does so where it forwards, on interfaces that packets to the address don't go to.
type Proxy struct {
	nl    Netlink
	write func(key, value string) error // of the kernel's settings
	read  func(key string) string

	mu   sync.Mutex // guards what follows
	held []plan.Announcement
	ndp  []string // interfaces on which we let it answer neighbour discovery
}

// OpenProxy takes hold of the kernel of the calling thread's network namespace, whose
// settings read returns.
func OpenProxy(read func(key string) string) (*Proxy, error) {
	nl, err := openNetlink()
	if err != nil {
		return nil, err
	}
	return OpenProxyOf(nl, read, func(key, value string) error {
		return os.WriteFile(filepath.Join(sysctlRoot, key), []byte(value), 0)
	}), nil
}

// OpenProxyOf is [OpenProxy] for another kernel; the proxy closes nl.
func OpenProxyOf(nl Netlink, read func(key string) string, write func(key, value string) error) *Proxy {
	return &Proxy{nl: nl, read: read, write: write}
}

// Set makes the kernel answer for exactly these addresses, as far as they were ours.
// Addresses without a link need no answers.
func (p *Proxy) Set(want []plan.Announcement) error {
	want = slices.DeleteFunc(slices.Clone(want), func(a plan.Announcement) bool { return a.Device == "" })
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, a := range p.held {
		if !slices.Contains(want, a) {
			errs = append(errs, p.remove(a))
		}
	}
	p.held = want
	for _, a := range want {
		errs = append(errs, p.add(a))
	}
	return errors.Join(errs...)
}

func (p *Proxy) add(a plan.Announcement) error {
	l, err := p.nl.LinkByName(a.Device)
	if err != nil {
		return nil // it is gone, and so is its link; Missing tells
	}
	if a.Addr.Is6() && !p.answersNDP(a.Device) {
		if err := p.write(ndpKey(a.Device), "1"); err == nil {
			p.ndp = append(p.ndp, a.Device)
		} // else Missing tells
	}
	if p.has(l, a.Addr) {
		return nil
	}
	if err := p.nl.NeighSet(neighbourProxy(l, a.Addr)); err != nil {
		return fmt.Errorf("let the kernel answer for %s on %q: %w", a.Addr, a.Device, err)
	}
	return nil
}

func (p *Proxy) remove(a plan.Announcement) error {
	l, err := p.nl.LinkByName(a.Device)
	if err != nil {
		return nil
	}
	if err := p.nl.NeighDel(neighbourProxy(l, a.Addr)); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("stop answering for %s on %q: %w", a.Addr, a.Device, err)
	}
	return nil
}

func neighbourProxy(l netlink.Link, a netip.Addr) *netlink.Neigh {
	family := unix.AF_INET
	if a.Is6() {
		family = unix.AF_INET6
	}
	return &netlink.Neigh{LinkIndex: l.Attrs().Index, Family: family, Flags: netlink.NTF_PROXY, IP: a.AsSlice()}
}

func (p *Proxy) has(l netlink.Link, a netip.Addr) bool {
	n := neighbourProxy(l, a)
	list, err := p.nl.NeighProxyList(n.LinkIndex, n.Family)
	return err == nil && slices.ContainsFunc(list, func(o netlink.Neigh) bool {
		ip, ok := netip.AddrFromSlice(o.IP)
		return ok && ip.Unmap() == a
	})
}

// Missing says why hosts of a link don't find an address that was set, and what helps;
// nil = they do.
func (p *Proxy) Missing() (remedy string, why error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range p.held {
		l, err := p.nl.LinkByName(a.Device)
		switch {
		case err != nil:
			return "", fmt.Errorf("interface %s, on whose link %s is, can't be looked at: %w", a.Device, a.Addr, err)
		case !p.has(l, a.Addr):
			return fmt.Sprintf("run ip neigh add proxy %s dev %s", a.Addr, a.Device), fmt.Errorf("the kernel doesn't answer for %s on %s", a.Addr, a.Device)
		case a.Addr.Is6() && !p.answersNDP(a.Device):
			key := "net.ipv6.conf." + a.Device + ".proxy_ndp"
			return "run sysctl -w " + key + "=1", fmt.Errorf("%s is 0, so that the kernel doesn't answer for %s", key, a.Addr)
		case !ForwardsFrom(p.read, a.Device, a.Addr.Is6()):
			key := cmp.Or(map[bool]string{true: "net.ipv6.conf.all.forwarding"}[a.Addr.Is6()], "net.ipv4.conf."+a.Device+".forwarding")
			return "run sysctl -w " + key + "=1", fmt.Errorf("%s is 0, so that the kernel doesn't answer for %s", key, a.Addr)
		}
	}
	return "", nil
}

func ndpKey(device string) string { return "ipv6/conf/" + device + "/proxy_ndp" }

func (p *Proxy) answersNDP(device string) bool {
	return p.read(ndpKey(device)) == "1" || p.read("ipv6/conf/all/proxy_ndp") == "1"
}

// Close undoes what was set.
func (p *Proxy) Close() error {
	err := p.Set(nil)
	for _, device := range p.ndp {
		_ = p.write(ndpKey(device), "0") // the interface may be gone
	}
	p.nl.Close()
	return err
}
