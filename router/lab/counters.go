package lab

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Losses are the kernel's counters of what was dropped in a namespace.
type Losses struct {
	ReceiveBuffers uint64            // datagrams for which those of UDP sockets had no room
	OpenSockets    uint64            // of these, at sockets that are still open: the node's
	Interfaces     map[string]uint64 // both ways
}

// Losses reads the counters.
func (n *Namespace) Losses() (Losses, error) {
	l := Losses{Interfaces: map[string]uint64{}}
	var snmp, udp []byte
	if err := n.Do(func() (err error) {
		const dir = "/proc/thread-self/net/"
		for file, to := range map[string]*[]byte{"snmp": &snmp, "udp": &udp, "udp6": &udp} {
			b, err := os.ReadFile(dir + file)
			if err != nil {
				return err
			}
			*to = append(*to, b...)
		}
		return nil
	}); err != nil {
		return l, fmt.Errorf("read counters of %q: %w", n.Name, err)
	}
	var names []string // a line of names precedes one of numbers
	for line := range bytes.Lines(snmp) {
		f := strings.Fields(string(line))
		if len(f) == 0 || f[0] != "Udp:" {
			continue
		}
		if i := slices.Index(names, "RcvbufErrors"); i >= 0 && i < len(f) {
			l.ReceiveBuffers, _ = strconv.ParseUint(f[i], 10, 64)
		}
		names = f
	}
	for line := range bytes.Lines(udp) { // the last of 13 columns counts drops
		if f := strings.Fields(string(line)); len(f) >= 13 {
			drops, _ := strconv.ParseUint(f[len(f)-1], 10, 64)
			l.OpenSockets += drops
		}
	}
	links, err := n.nl.LinkList()
	if err != nil {
		return l, fmt.Errorf("list interfaces of %q: %w", n.Name, err)
	}
	for _, link := range links {
		if a := link.Attrs(); a.Statistics != nil {
			l.Interfaces[a.Name] = a.Statistics.RxDropped + a.Statistics.TxDropped
		}
	}
	return l, nil
}
