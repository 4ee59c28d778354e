// Package packet is how packets come from an Ethernet interface and go to it, past the
// kernel's routing: packet sockets with a filter that takes what is for the overlay, and
// with the offloads of the interface. It needs CAP_NET_RAW alone, and Linux 5.1.
package packet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	batch = 128
	// Room for what comes while nobody reads, and for what the interface hasn't sent yet,
	// in bytes. The kernel gives less where net.core.rmem_max and wmem_max say so.
	receiveBuffer, sendBuffer = 8 << 20, 4 << 20
)

// Device is the VPC's interface. Packets to prefixes that were set are read from it, each
// also by the kernel, and what is written goes to the MAC that its destination was heard
// from. Several goroutines may write.
type Device struct {
	name      string
	index     int
	start     time.Time
	mac       atomic.Uint64
	file      *os.File // receives
	raw       syscall.RawConn
	send      int // a socket that receives nothing
	ip4, ip6  int // sockets by which the kernel finds the way; -1 = none
	reader    *reader
	writers   sync.Pool // of *writer
	known     *neighbours
	inside    insider
	own       atomic.Pointer[map[addressKey]struct{}] // this host's
	loose     atomic.Pointer[prefixSet]               // what the filter should take and can't tell; nil = it does
	kernel    atomic.Uint64                           // packets that the kernel lost before they were read
	injected  injected
	closeOnce sync.Once
	closing   sync.RWMutex // held for reading while send, ip4 and ip6 are used
	closed    bool
}

// insider is a host of the VPC that lives in this process.
type insider struct {
	addrs   []addressKey
	deliver func(ip []byte)
}

// Open opens a device on an interface, in the network namespace of the calling thread. It
// takes nothing before [Device.SetPrefixes]. Its errors say what is missing.
func Open(name string) (_ *Device, err error) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return nil, fmt.Errorf("open interface %q: %w", name, err)
	}
	if len(i.HardwareAddr) != 6 || i.Flags&net.FlagLoopback != 0 {
		return nil, fmt.Errorf("open interface %q: it isn't an Ethernet interface: use another, or vpc.ingress: tun", name)
	}
	d := &Device{name: name, index: i.Index, start: time.Now(), send: -1, ip4: -1, ip6: -1, known: newNeighbours()}
	d.SetOwn(nil)
	d.mac.Store(macOf(i.HardwareAddr))
	defer func() {
		if err != nil {
			_ = d.Close()
		}
	}()
	if err := d.openReceiver(); err != nil {
		return nil, fmt.Errorf("open a packet socket on %q: %w%s", name, err, permissionHint(err))
	}
	if err := d.openSenders(); err != nil {
		return nil, fmt.Errorf("open a packet socket on %q: %w%s", name, err, permissionHint(err))
	}
	d.reader = newReader(d)
	udp := sendsDatagrams()
	d.writers.New = func() any { return newWriter(d, udp) }
	return d, nil
}

func permissionHint(err error) string {
	if errors.Is(err, os.ErrPermission) {
		return ": run as root, or give the capability NET_RAW"
	}
	return ""
}

func (d *Device) openReceiver() error {
	// Of no protocol: nothing comes from other interfaces before it is bound.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	d.file = os.NewFile(uintptr(fd), "packet socket on "+d.name)
	if d.raw, err = d.file.SyscallConn(); err != nil {
		return err
	}
	for _, o := range []struct{ option, value int }{
		{unix.PACKET_IGNORE_OUTGOING, 1},
		{unix.PACKET_VNET_HDR, 1}, // else: checksums that aren't finished, and large packets without a hint
	} {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, o.option, o.value); err != nil {
			return fmt.Errorf("packet socket option %d: %w", o.option, err)
		}
	}
	grow(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, receiveBuffer)
	if err := attach(fd, toPrefixes(nil)); err != nil {
		return err
	}
	// All protocols: a drop rule at the interface hides packets from a socket of one
	// protocol, and such rules keep the kernel's own copy away.
	return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: d.index})
}

func (d *Device) openSenders() (err error) {
	const kind = unix.SOCK_RAW | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
	if d.send, err = unix.Socket(unix.AF_PACKET, kind, 0); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(d.send, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return fmt.Errorf("packet socket option %d: %w", unix.PACKET_VNET_HDR, err)
	}
	grow(d.send, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, sendBuffer)
	if err := unix.Bind(d.send, &unix.SockaddrLinklayer{Ifindex: d.index}); err != nil {
		return err
	}
	if d.ip4, err = unix.Socket(unix.AF_INET, kind, unix.IPPROTO_RAW); err != nil {
		return fmt.Errorf("raw socket: %w", err)
	}
	if d.ip6, err = unix.Socket(unix.AF_INET6, kind, unix.IPPROTO_RAW); err != nil {
		d.ip6 = -1 // IPv6 is switched off
	}
	return nil
}

// grow gives a socket as much room as we may have.
func grow(fd, force, plain, size int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, size) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, plain, size)
	}
}

func networkOrder(n uint16) uint16 { return n<<8 | n>>8 }

func macOf(b []byte) uint64 {
	return uint64(b[0])<<40 | uint64(b[1])<<32 | uint64(b[2])<<24 | uint64(b[3])<<16 | uint64(b[4])<<8 | uint64(b[5])
}

// sendsDatagrams reports whether the kernel cuts large UDP packets for packet sockets,
// which is since Linux 6.2.
func sendsDatagrams() bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	var major, minor int
	_, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return err == nil && (major > 6 || major == 6 && minor >= 2)
}

// SetPrefixes says which destinations to take. The change is atomic.
func (d *Device) SetPrefixes(prefixes []netip.Prefix) error {
	set := prefixSet(disjoint(prefixes))
	d.loose.Store(&set) // before a filter that lets more pass
	var exact bool
	var err error
	if cerr := d.raw.Control(func(fd uintptr) { exact, err = attachPrefixes(int(fd), set) }); cerr != nil {
		return os.ErrClosed
	}
	switch {
	case err != nil:
		return fmt.Errorf("filter of %q: %w", d.name, err)
	case exact:
		d.loose.Store(nil)
	}
	return nil
}

// SetInside says that hosts with addresses live in this process: what is written to them
// goes to deliver, which must not keep it, and nobody else may send as they do. It is
// called before anything is read or written.
func (d *Device) SetInside(addrs []netip.Addr, deliver func(ip []byte)) {
	d.inside = insider{deliver: deliver}
	for _, a := range addrs {
		d.inside.addrs = append(d.inside.addrs, keyOf(a))
	}
}

// SetOwn says which addresses this host has. Packets to them are refused: its answers
// wouldn't come back to us.
func (d *Device) SetOwn(addrs []netip.Addr) {
	own := make(map[addressKey]struct{}, len(addrs))
	for _, a := range addrs {
		own[keyOf(a)] = struct{}{}
	}
	d.own.Store(&own)
}

// Heard returns the MAC that packets to a host go to, if the host was heard lately.
func (d *Device) Heard(a netip.Addr) (net.HardwareAddr, bool) {
	mac, ok := d.known.lookup(d.seconds(), keyOf(a))
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], mac)
	return b[2:], ok
}

func (i *insider) has(k addressKey) bool { return slices.Contains(i.addrs, k) }

// Name returns the name of the interface.
func (d *Device) Name() string { return d.name }

// BatchSize implements netstack.Device.
func (*Device) BatchSize() int { return batch }

// MTU returns the MTU that the interface has now, in bytes.
func (d *Device) MTU() (int, error) {
	i, err := net.InterfaceByIndex(d.index)
	if err != nil {
		return 0, fmt.Errorf("find interface %q: %w", d.name, err)
	}
	if len(i.HardwareAddr) == 6 {
		d.mac.Store(macOf(i.HardwareAddr)) // which may change too
	}
	return i.MTU, nil
}

// Lost returns how many packets came and were lost before they could be read; of those
// that the kernel had merged it counts one.
func (d *Device) Lost() uint64 {
	_ = d.raw.Control(func(fd uintptr) { // clears what it reads: nobody else may do so
		if s, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			d.kernel.Add(uint64(s.Drops))
		}
	})
	return d.kernel.Load()
}

// Close ends reading and writing; closing twice is harmless.
func (d *Device) Close() (err error) {
	d.closeOnce.Do(func() {
		if d.file != nil {
			err = d.file.Close()
		}
		d.closing.Lock()
		defer d.closing.Unlock()
		d.closed = true
		for _, fd := range []int{d.send, d.ip4, d.ip6} {
			if fd >= 0 {
				err = errors.Join(err, unix.Close(fd))
			}
		}
	})
	return err
}

// seconds is a coarse clock for the memory of neighbours.
func (d *Device) seconds() int64 { return int64(time.Since(d.start) / time.Second) }
