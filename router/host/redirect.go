package host

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Mark is what packets bear that [Redirect] is about. Where it lies is the same in TCP
// segments and ICMP echo requests without IP options or extension headers.
type Mark struct {
	ID   uint16 // identification of IPv4, flow label of IPv6
	Word uint32 // sequence number of TCP, identifier and sequence number of ICMP; the last byte is free
}

const markFree = 0xff

// Where Word lies: 4 bytes into the transport header.
const (
	word4 = 20 + 4
	word6 = 40 + 4
)

// Of returns the free byte of a packet that bears the mark.
func (m Mark) Of(packet []byte) (free uint8, ok bool) {
	at := word4
	switch {
	case len(packet) < word4+4:
		return 0, false
	case packet[0]>>4 == 4:
		ok = binary.BigEndian.Uint16(packet[4:]) == m.ID
	case packet[0]>>4 == 6 && len(packet) >= word6+4:
		at, ok = word6, binary.BigEndian.Uint32(packet)&0xfffff == uint32(m.ID)
	}
	if !ok {
		return 0, false
	}
	word := binary.BigEndian.Uint32(packet[at:])
	return uint8(word & markFree), word&^markFree == m.Word&^markFree
}

// Redirect makes the kernel treat marked packets that are written to a TUN as received
// by another interface. It lays nothing on that one: what it needs hangs on the TUN, and
// goes with it.
type Redirect struct {
	nl  *netlink.Handle
	tun string
}

// redirectPriority is that of our filters, and so says which are ours.
const redirectPriority = 0x7a7a

// OpenRedirect opens the kernel of the calling thread's network namespace. Close frees it.
func OpenRedirect(tun string) (*Redirect, error) {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	return &Redirect{nl: nl, tun: tun}, nil
}

// Lay redirects packets with a mark to an interface, and no others any more.
func (r *Redirect) Lay(m Mark, device string) error {
	tun, err := r.nl.LinkByName(r.tun)
	if err != nil {
		return fmt.Errorf("find %s: %w", r.tun, err)
	}
	to, err := r.nl.LinkByName(device)
	if err != nil {
		return fmt.Errorf("find %s: %w", device, err)
	}
	q := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: tun.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	if err := r.nl.QdiscAdd(q); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add clsact to %s: %w", r.tun, err)
	}
	for i, keys := range [][]netlink.TcU32Key{
		{{Mask: 0xffff0000, Val: uint32(m.ID) << 16, Off: 4}, {Mask: ^uint32(markFree), Val: m.Word &^ markFree, Off: word4}},
		{{Mask: 0xfffff, Val: uint32(m.ID), Off: 0}, {Mask: ^uint32(markFree), Val: m.Word &^ markFree, Off: word6}},
	} {
		f := &netlink.U32{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: tun.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS,
				Priority: redirectPriority + uint16(i), Protocol: [...]uint16{unix.ETH_P_IP, unix.ETH_P_IPV6}[i]},
			Sel: &netlink.TcU32Sel{Keys: keys, Nkeys: uint8(len(keys)), Flags: netlink.TC_U32_TERMINAL},
			Actions: []netlink.Action{&netlink.MirredAction{ActionAttrs: netlink.ActionAttrs{Action: netlink.TC_ACT_STOLEN},
				MirredAction: netlink.TCA_INGRESS_REDIR, Ifindex: to.Attrs().Index}},
		}
		_ = r.nl.FilterDel(f) // the last one, if there is any
		if err := r.nl.FilterAdd(f); err != nil {
			return fmt.Errorf("redirect from %s to %s: %w", r.tun, device, err)
		}
	}
	return nil
}

// Close frees the handle; closing twice is harmless.
func (r *Redirect) Close() { r.nl.Close() }
