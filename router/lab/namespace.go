package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Namespace is a named network namespace, visible to `ip netns`. Its methods are
// safe for concurrent use.
type Namespace struct {
	Name string
	ns   netns.NsHandle
	nl   *netlink.Handle
}

// newNamespace makes a named namespace with loopback up.
func newNamespace(name string) (_ *Namespace, err error) {
	n := &Namespace{Name: name}
	if err := shareNetnsDir(); err != nil {
		return nil, fmt.Errorf("create network namespace %q: %w", name, err)
	}
	err = onThread(func() (err error) {
		n.ns, err = netns.NewNamed(name) // moves the thread there
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("create network namespace %q: %w", name, err)
	}
	if n.nl, err = netlink.NewHandleAt(n.ns, unix.NETLINK_ROUTE); err != nil {
		n.close()
		return nil, fmt.Errorf("open netlink in %q: %w", name, err)
	}
	if err := n.up("lo"); err != nil {
		n.close()
		return nil, err
	}
	return n, nil
}

// shareNetnsDir makes the directory of named namespaces a shared mount, as `ip
// netns add` does. If that happened only after we mounted a namespace there, ours
// would be hidden below and could not be removed.
func shareNetnsDir() error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	share := func() error { return unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "") }
	err := share()
	if errors.Is(err, unix.EINVAL) { // no mount point yet
		if err := unix.Mount(netnsDir, netnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("mount %s: %w", netnsDir, err)
		}
		err = share()
	}
	if err != nil {
		return fmt.Errorf("share %s: %w", netnsDir, err)
	}
	return nil
}

// removeNamespace removes the name of a namespace; the namespace itself ends with
// its last user.
func removeNamespace(name string) error {
	path := filepath.Join(netnsDir, name)
	for {
		if err := unix.Unmount(path, unix.MNT_DETACH); errors.Is(err, unix.EINVAL) {
			return os.Remove(path) // nothing is mounted there any more
		} else if err != nil {
			return err
		}
	}
}

// etcDir holds what `ip netns exec` puts in the place of files in /etc.
const etcDir = "/etc/netns"

// Etc gives programs that are started in the namespace from now on a file of their
// own in the place of one in /etc, as `ip netns exec` does. Written again, it changes
// for those that run, too.
func (n *Namespace) Etc(name, content string) error {
	dir := filepath.Join(etcDir, n.Name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644)
}

// ownEtc reports whether [Namespace.Etc] was called.
func (n *Namespace) ownEtc() bool {
	_, err := os.Stat(filepath.Join(etcDir, n.Name))
	return err == nil
}

// close frees the handles; the namespace itself stays.
func (n *Namespace) close() {
	if n.nl != nil {
		n.nl.Close()
	}
	_ = n.ns.Close()
}

// Do runs f on a thread inside the namespace and waits for it. Sockets that f
// opens and processes that it starts, on its own goroutine, are in the namespace.
func (n *Namespace) Do(f func() error) error {
	return onThread(func() error {
		if err := netns.Set(n.ns); err != nil {
			return fmt.Errorf("enter network namespace %q: %w", n.Name, err)
		}
		return f()
	})
}

// onThread runs f on a thread of its own, whose namespace f may change.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			done <- fmt.Errorf("find own network namespace: %w", err)
			return
		}
		defer home.Close()
		err = f()
		if netns.Set(home) == nil {
			runtime.UnlockOSThread() // else the thread ends with the goroutine
		}
		done <- err
	}()
	return <-done
}

// Command prepares a program that Start of the command, called within
// [Namespace.Do], runs in the namespace.
func (n *Namespace) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, name, args...)
}

// Run runs a program in the namespace and returns what it printed.
func (n *Namespace) Run(ctx context.Context, name string, args ...string) ([]byte, error) {
	var out []byte
	err := n.Do(func() (err error) {
		out, err = n.Command(ctx, name, args...).CombinedOutput()
		return err
	})
	return out, err
}

// Input is Run with standard input.
func (n *Namespace) Input(ctx context.Context, in, name string, args ...string) ([]byte, error) {
	var out []byte
	err := n.Do(func() (err error) {
		c := n.Command(ctx, name, args...)
		c.Stdin = strings.NewReader(in)
		out, err = c.CombinedOutput()
		return err
	})
	return out, err
}

// Dial connects from within the namespace. address must not need a resolver.
func (n *Namespace) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = n.Do(func() (err error) {
		var d net.Dialer
		conn, err = d.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen listens within the namespace.
func (n *Namespace) Listen(network, address string) (l net.Listener, err error) {
	err = n.Do(func() (err error) {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

// ListenPacket opens a datagram socket within the namespace.
func (n *Namespace) ListenPacket(network, address string) (c net.PacketConn, err error) {
	err = n.Do(func() (err error) {
		c, err = net.ListenPacket(network, address)
		return err
	})
	return c, err
}

// Sysctl sets a kernel parameter of the namespace, as in
// "net/ipv4/ip_forward".
func (n *Namespace) Sysctl(key, value string) error {
	return n.Do(func() error {
		if err := os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0); err != nil {
			return fmt.Errorf("set %s in %q: %w", strings.ReplaceAll(key, "/", "."), n.Name, err)
		}
		return nil
	})
}

func (n *Namespace) up(ifname string) error {
	l, err := n.nl.LinkByName(ifname)
	if err != nil {
		return fmt.Errorf("find interface %q in %q: %w", ifname, n.Name, err)
	}
	if err := n.nl.LinkSetUp(l); err != nil {
		return fmt.Errorf("set interface %q in %q up: %w", ifname, n.Name, err)
	}
	return nil
}

// AddAddress gives an interface an address; the interface is up afterwards.
func (n *Namespace) AddAddress(ifname string, p netip.Prefix) error {
	l, err := n.nl.LinkByName(ifname)
	if err != nil {
		return fmt.Errorf("find interface %q in %q: %w", ifname, n.Name, err)
	}
	a := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	if err := n.nl.AddrAdd(l, a); err != nil {
		return fmt.Errorf("add address %s to %q in %q: %w", p, ifname, n.Name, err)
	}
	return n.up(ifname)
}

// RemoveAddress takes an address away from an interface.
func (n *Namespace) RemoveAddress(ifname string, p netip.Prefix) error {
	l, err := n.nl.LinkByName(ifname)
	if err == nil {
		err = n.nl.AddrDel(l, &netlink.Addr{IPNet: ipNet(p)})
	}
	if err != nil {
		return fmt.Errorf("remove address %s from %q in %q: %w", p, ifname, n.Name, err)
	}
	return nil
}

// AddRoute routes to target through a neighbour.
func (n *Namespace) AddRoute(target netip.Prefix, via netip.Addr) error {
	if err := n.nl.RouteAdd(&netlink.Route{Dst: ipNet(target), Gw: via.AsSlice()}); err != nil {
		return fmt.Errorf("add route %s via %s in %q: %w", target, via, n.Name, err)
	}
	return nil
}

// Bridge makes a bridge in the namespace.
func (n *Namespace) Bridge(name string) error {
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}
	if err := n.nl.LinkAdd(br); err != nil {
		return fmt.Errorf("create bridge %q in %q: %w", name, n.Name, err)
	}
	return n.up(name)
}

// Connect joins two namespaces by a pair of interfaces, which are up.
func Connect(a *Namespace, aName string, b *Namespace, bName string) error {
	v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: aName}, PeerName: bName, PeerNamespace: netlink.NsFd(b.ns)}
	if err := a.nl.LinkAdd(v); err != nil {
		return fmt.Errorf("connect %q in %q with %q in %q: %w", aName, a.Name, bName, b.Name, err)
	}
	return errors.Join(a.up(aName), b.up(bName))
}

// Plug connects ifname of n with a bridge in sw by a port called port.
func Plug(n *Namespace, ifname string, sw *Namespace, bridge, port string) error {
	if err := Connect(n, ifname, sw, port); err != nil {
		return err
	}
	br, err := sw.nl.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("find bridge %q in %q: %w", bridge, sw.Name, err)
	}
	p, err := sw.nl.LinkByName(port)
	if err != nil {
		return fmt.Errorf("find interface %q in %q: %w", port, sw.Name, err)
	}
	if err := sw.nl.LinkSetMaster(p, br); err != nil {
		return fmt.Errorf("plug %q into bridge %q: %w", port, bridge, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
