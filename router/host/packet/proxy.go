package packet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"ztgate/internal/rate"
	"ztgate/router/host/offload"
)

// Proxy answers ARP and neighbour discovery on an Ethernet interface for addresses that
// this host's kernel doesn't have, by a packet socket of its own. It needs CAP_NET_RAW.
type Proxy struct {
	name    string
	index   int
	file    *os.File
	raw     syscall.RawConn
	set     atomic.Pointer[proxied]
	defends rate.Shared
	rival   atomic.Pointer[Rival]
	start   time.Time
	joined  []netip.Addr // whose multicast groups the interface listens to; used by Set alone
}

type proxied struct {
	addrs []netip.Addr
	mac   net.HardwareAddr
}

// Rival is another host that says it has an address of ours.
type Rival struct {
	Addr netip.Addr
	MAC  net.HardwareAddr
	Seen time.Time
}

const (
	etherARP     = 0x0806
	arpLen       = 28
	solicitation = 135
	advertising  = 136
	ndpLen       = 24 // with the target, without options
	// defendEvery is how often an address is announced again that another host claims
	// (RFC 5227 §2.4).
	defendEvery = 10 * time.Second
	maxFrame    = 1514
)

// OpenProxy opens a proxy on an interface, in the network namespace of the calling thread. It
// answers for nothing before [Proxy.Set].
func OpenProxy(name string) (_ *Proxy, err error) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return nil, fmt.Errorf("open interface %q: %w", name, err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open a packet socket on %q: %w%s", name, err, permissionHint(err))
	}
	p := &Proxy{name: name, index: i.Index, file: os.NewFile(uintptr(fd), "ARP on "+name), start: time.Now()}
	p.set.Store(&proxied{})
	defer func() {
		if err != nil {
			_ = p.Close()
		}
	}()
	if p.raw, err = p.file.SyscallConn(); err != nil {
		return nil, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
		return nil, fmt.Errorf("packet socket option %d: %w", unix.PACKET_IGNORE_OUTGOING, err)
	}
	if err := attachTo(fd, neighbourMessages()); err != nil {
		return nil, err
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: i.Index}); err != nil {
		return nil, err
	}
	return p, nil
}

// neighbourMessages takes ARP, and the two messages of neighbour discovery that are about
// an address.
func neighbourMessages() []bpf.Instruction {
	const (
		next6 = offload.EthernetLen + 6
		type6 = offload.EthernetLen + 40
	)
	return []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtVLANTagPresent},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 0, SkipTrue: 9},
		bpf.LoadAbsolute{Off: 12, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: etherARP, SkipTrue: 6},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: etherIPv6, SkipTrue: 6},
		bpf.LoadAbsolute{Off: next6, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_ICMPV6, SkipTrue: 4},
		bpf.LoadAbsolute{Off: type6, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: solicitation, SkipTrue: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: advertising, SkipTrue: 1},
		bpf.RetConstant{Val: maxFrame},
		bpf.RetConstant{},
	}
}

// Set makes it answer for exactly these addresses, and announces those that are new.
func (p *Proxy) Set(addrs []netip.Addr) error {
	i, err := net.InterfaceByIndex(p.index)
	if err != nil {
		return fmt.Errorf("find interface %q: %w", p.name, err)
	}
	if len(i.HardwareAddr) != 6 {
		return fmt.Errorf("interface %q isn't an Ethernet interface", p.name)
	}
	old := p.set.Load()
	if slices.Equal(old.addrs, addrs) && slices.Equal(old.mac, i.HardwareAddr) {
		return nil
	}
	next := &proxied{slices.Clone(addrs), i.HardwareAddr}
	p.set.Store(next)
	errs := []error{p.listen(addrs)}
	for _, a := range addrs {
		if !slices.Contains(old.addrs, a) || !slices.Equal(old.mac, next.mac) {
			errs = append(errs, p.send(next.announce(a)))
		}
	}
	return errors.Join(errs...)
}

// listen makes the interface take what is sent to the groups in which hosts look for IPv6
// addresses.
func (p *Proxy) listen(addrs []netip.Addr) (err error) {
	change := func(option int, a netip.Addr) {
		m := unix.PacketMreq{Ifindex: int32(p.index), Type: unix.PACKET_MR_MULTICAST, Alen: 6}
		mac := groupMAC(a)
		copy(m.Address[:], mac[:])
		cerr := p.raw.Control(func(fd uintptr) {
			err = errors.Join(err, unix.SetsockoptPacketMreq(int(fd), unix.SOL_PACKET, option, &m))
		})
		err = errors.Join(err, cerr)
	}
	for _, a := range p.joined {
		if !slices.Contains(addrs, a) {
			change(unix.PACKET_DROP_MEMBERSHIP, a)
		}
	}
	for _, a := range addrs {
		if a.Is6() && !slices.Contains(p.joined, a) {
			change(unix.PACKET_ADD_MEMBERSHIP, a)
		}
	}
	p.joined = slices.DeleteFunc(slices.Clone(addrs), netip.Addr.Is4)
	return err
}

// groupMAC is where solicitations for an address are sent (RFC 4291 §2.7.1, RFC 2464 §7).
func groupMAC(a netip.Addr) [6]byte {
	b := a.As16()
	return [6]byte{0x33, 0x33, 0xff, b[13], b[14], b[15]}
}

// Rival returns who last claimed one of the addresses, nil if nobody did.
func (p *Proxy) Rival() *Rival { return p.rival.Load() }

// Run answers until ctx ends, or the interface is gone.
func (p *Proxy) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = p.Close() })
	defer stop()
	b := make([]byte, maxFrame)
	for {
		n, err := p.file.Read(b)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENETDOWN):
			if _, err := net.InterfaceByIndex(p.index); err != nil {
				return nil // who reads packets there ends the process
			}
		case errors.Is(err, os.ErrClosed):
			return nil
		case err != nil:
		default:
			if answer := p.handle(b[:n]); answer != nil {
				_ = p.send(answer) // lost like on any link: who asks asks again
			}
		}
	}
}

func (p *Proxy) send(frame []byte) error {
	_, err := p.file.Write(frame)
	return err
}

// Close ends it; closing twice is harmless.
func (p *Proxy) Close() error {
	if err := p.file.Close(); !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// handle returns the answer to a frame, nil if there is none.
func (p *Proxy) handle(f []byte) []byte {
	s := p.set.Load()
	if len(f) < offload.EthernetLen || len(s.addrs) == 0 {
		return nil
	}
	from := net.HardwareAddr(f[6:12])
	if slices.Equal(from, s.mac) {
		return nil
	}
	switch body := f[offload.EthernetLen:]; binary.BigEndian.Uint16(f[12:]) {
	case etherARP:
		return p.arp(s, body)
	case etherIPv6:
		return p.ndp(s, from, body)
	}
	return nil
}

// arp answers a request, and notices who claims an address (RFC 826, RFC 5227).
func (p *Proxy) arp(s *proxied, b []byte) []byte {
	if len(b) < arpLen || [6]byte(b) != [6]byte{0, 1, 8, 0, 6, 4} {
		return nil
	}
	op, from := binary.BigEndian.Uint16(b[6:]), net.HardwareAddr(b[8:14])
	sender, target := netip.AddrFrom4([4]byte(b[14:18])), netip.AddrFrom4([4]byte(b[24:28]))
	if slices.Contains(s.addrs, sender) && !slices.Equal(from, s.mac) {
		return p.claimed(s, sender, from)
	}
	if op != 1 || !slices.Contains(s.addrs, target) {
		return nil
	}
	return s.arpFrame(2, target, [6]byte(from), sender)
}

// ndp is arp for IPv6 (RFC 4861 §7.2).
func (p *Proxy) ndp(s *proxied, from net.HardwareAddr, b []byte) []byte {
	if len(b) < 40+ndpLen || b[0]>>4 != 6 || b[6] != unix.IPPROTO_ICMPV6 || b[7] != 255 {
		return nil
	}
	msg := b[40:]
	if n := int(binary.BigEndian.Uint16(b[4:])); n > len(msg) || n < ndpLen {
		return nil
	} else {
		msg = msg[:n]
	}
	src, target := netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(msg[8:24]))
	if !slices.Contains(s.addrs, target) || sum6(src, netip.AddrFrom16([16]byte(b[24:40])), msg) != 0 {
		return nil
	}
	switch {
	case msg[0] == advertising:
		return p.claimed(s, target, from)
	case msg[0] != solicitation:
		return nil
	case src.IsUnspecified(): // it wants the address for itself (RFC 4862 §5.4.3)
		return s.announce(target)
	}
	return s.advertisement(target, [6]byte(from), src, true)
}

// claimed notes who claims an address, and defends it.
func (p *Proxy) claimed(s *proxied, a netip.Addr, by net.HardwareAddr) []byte {
	p.rival.Store(&Rival{a, slices.Clone(by), time.Now()})
	if !p.defends.Take(int64(time.Since(p.start))+1, 1, defendEvery, 1) {
		return nil
	}
	return s.announce(a)
}

// announce tells all hosts of the link that we have an address.
func (s *proxied) announce(a netip.Addr) []byte {
	if a.Is4() {
		return s.arpFrame(1, a, broadcastMAC, a)
	}
	return s.advertisement(a, [6]byte{0x33, 0x33, 0, 0, 0, 1}, netip.IPv6LinkLocalAllNodes(), false)
}

var broadcastMAC = [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// arpFrame makes an ARP message about an address of ours.
func (s *proxied) arpFrame(op byte, ours netip.Addr, to [6]byte, target netip.Addr) []byte {
	f := make([]byte, 0, offload.EthernetLen+arpLen)
	f = append(append(append(f, to[:]...), s.mac...), 0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, op)
	f = append(append(f, s.mac...), ours.AsSlice()...)
	if op == 1 {
		to = [6]byte{} // an announcement asks nobody
	}
	return append(append(f, to[:]...), target.AsSlice()...)
}

// advertisement makes a neighbour advertisement for an address of ours, with its MAC. It
// says that we forward packets.
func (s *proxied) advertisement(ours netip.Addr, to [6]byte, dst netip.Addr, solicited bool) []byte {
	msg := []byte{advertising, 0, 0, 0, 0x80 | 0x20, 0, 0, 0}
	if solicited {
		msg[4] |= 0x40
	}
	msg = append(append(append(msg, ours.AsSlice()...), 2, 1), s.mac...)
	binary.BigEndian.PutUint16(msg[2:], sum6(ours, dst, msg))
	f := make([]byte, 0, offload.EthernetLen+40+len(msg))
	f = append(append(append(f, to[:]...), s.mac...), 0x86, 0xdd, 0x60, 0, 0, 0, 0, byte(len(msg)), unix.IPPROTO_ICMPV6, 255)
	f = append(append(f, ours.AsSlice()...), dst.AsSlice()...)
	return append(f, msg...)
}

// sum6 returns the checksum of an ICMPv6 message, 0 if it has a right one.
func sum6(src, dst netip.Addr, msg []byte) uint16 {
	sum := uint32(len(msg)) + unix.IPPROTO_ICMPV6
	for _, b := range [][]byte{src.AsSlice(), dst.AsSlice(), msg} {
		for i := 0; i < len(b); i += 2 {
			sum += uint32(b[i]) << 8
			if i+1 < len(b) {
				sum += uint32(b[i+1])
			}
		}
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
