package gatewaytest

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/ztnode"
)

// OfficeAddress is the member behind which an [Office] is.
const OfficeAddress identity.Address = 0x9e7f2a11c3

// Office is everybody on the IPv4 networks of a [Node]: whatever address is asked
// for answers by ARP, to echo requests and to connections.
type Office struct {
	mu     sync.Mutex
	off    bool
	closed bool
}

// NewOffice returns an office at which all ports are open.
func NewOffice() *Office { return &Office{} }

// SwitchOff makes everybody silent, and switches them on again.
func (o *Office) SwitchOff(off bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.off = off
}

// Refuse makes everybody refuse connections, and accept them again.
func (o *Office) Refuse(refuse bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed = refuse
}

// answer returns the frame that a frame is answered by, nil for none.
func (o *Office) answer(network ztnode.NetworkID, f []byte) []byte {
	o.mu.Lock()
	off, refuse := o.off, o.closed
	o.mu.Unlock()
	const headerLen = 14
	mac := ztnode.MACOf(network, OfficeAddress)
	if off || len(f) < headerLen+ipLen {
		return nil
	}
	header := slices.Concat(f[6:12], mac[:], f[12:headerLen])
	switch binary.BigEndian.Uint16(f[12:]) {
	case unix.ETH_P_ARP:
		if reply := answerARP(mac, f[headerLen:]); reply != nil {
			return append(header, reply...)
		}
	case unix.ETH_P_IP:
		if reply := answerIP(f[headerLen:], refuse); reply != nil {
			return append(header, reply...)
		}
	}
	return nil
}

func answerARP(mac ztnode.MAC, b []byte) []byte {
	const length = 28
	if len(b) < length || b[7] != 1 || string(b[14:18]) == string(b[24:28]) { // an announcement
		return nil
	}
	reply := slices.Clone(b[:length])
	reply[7] = 2
	copy(reply[8:], mac[:])
	copy(reply[14:], b[24:28])
	copy(reply[18:], b[8:18])
	return reply
}

func answerIP(b []byte, refuse bool) []byte {
	src, dst := netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	message := b[int(b[0]&15)*4 : binary.BigEndian.Uint16(b[2:])]
	switch {
	case b[9] == unix.IPPROTO_ICMP && message[0] == 8:
		return echoReply(dst, src, message)
	case b[9] == unix.IPPROTO_TCP:
		return answerTCP(dst, src, message, refuse)
	}
	return nil
}

// answerTCP is a host that agrees to everything.
func answerTCP(us, them netip.Addr, b []byte, refuse bool) []byte {
	from := netip.AddrPortFrom(them, binary.BigEndian.Uint16(b))
	to := netip.AddrPortFrom(us, binary.BigEndian.Uint16(b[2:]))
	seq, ack, flags := binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:]), b[13]
	n := uint32(len(b) - int(b[12]>>4)*4)
	switch {
	case flags&RST != 0:
	case flags&SYN != 0 && refuse:
		return TCP(to, from, RST|ACK, 0, seq+1, nil)
	case flags&SYN != 0:
		return TCP(to, from, SYN|ACK, firstSeq, seq+1, nil)
	case flags&FIN != 0:
		return TCP(to, from, FIN|ACK, ack, seq+n+1, nil)
	case n > 0:
		return TCP(to, from, ACK, ack, seq+n, nil)
	}
	return nil
}

// firstSeq is the sequence number that the office's ends begin with.
const firstSeq = 5000
