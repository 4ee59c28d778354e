package packet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"ztgate/router/host/offload"
)

const (
	// maxInstructions is the most that the kernel takes of a filter (BPF_MAXINSNS).
	maxInstructions = 4096
	wholePacket     = 1 << 18

	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd

	// Where destinations lie in a frame.
	destination4 = offload.EthernetLen + 16
	destination6 = offload.EthernetLen + 24
)

// disjoint returns prefixes in the order of their addresses, without those that lie in
// others.
func disjoint(prefixes []netip.Prefix) (out []netip.Prefix) {
	list := make([]netip.Prefix, 0, len(prefixes))
	for _, p := range prefixes {
		list = append(list, p.Masked())
	}
	slices.SortFunc(list, netip.Prefix.Compare) // by address, then the shorter ones first
	for _, p := range list {
		if n := len(out); n == 0 || !out[n-1].Overlaps(p) {
			out = append(out, p)
		}
	}
	return out
}

// prefixSet is disjoint prefixes in the order of their addresses.
type prefixSet []netip.Prefix

func (s prefixSet) contains(a netip.Addr) bool {
	i, exact := slices.BinarySearchFunc(s, a, func(p netip.Prefix, a netip.Addr) int { return p.Addr().Compare(a) })
	return exact || i > 0 && s[i-1].Contains(a)
}

// forUs takes frames for this host's own MAC. The kernel has taken the tag of a VLAN off;
// those frames are for another interface, unless the tag has a priority alone.
func forUs() []bpf.Instruction {
	const onlyPriority = 0x0fff
	return []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtType},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.PACKET_HOST, SkipTrue: 1},
		bpf.RetConstant{},
		bpf.LoadExtension{Num: bpf.ExtVLANTagPresent},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 4},
		bpf.LoadExtension{Num: bpf.ExtVLANTag},
		bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: onlyPriority},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1},
		bpf.RetConstant{},
	}
}

// toPrefixes takes IP packets whose destinations lie in prefixes, which are disjoint.
func toPrefixes(prefixes []netip.Prefix) []bpf.Instruction {
	var v4, v6 []bpf.Instruction
	mask := -1
	for _, p := range byLength(prefixes) {
		if p.Addr().Is4() {
			v4, mask = append(v4, match4(p, p.Bits() != mask)...), p.Bits()
		} else {
			v6 = append(v6, match6(p)...)
		}
	}
	if len(v4) > 0 {
		v4 = append([]bpf.Instruction{bpf.LoadAbsolute{Off: destination4, Size: 4}, bpf.TAX{}}, v4...)
	}
	if len(v6) > 0 {
		var load []bpf.Instruction
		for i := range 4 {
			load = append(load, bpf.LoadAbsolute{Off: uint32(destination6 + 4*i), Size: 4}, bpf.StoreScratch{Src: bpf.RegA, N: i})
		}
		v6 = append(load, v6...)
	}
	return families(append(v4, bpf.RetConstant{}), append(v6, bpf.RetConstant{}))
}

// families goes on with one of two programs, which both return.
func families(v4, v6 []bpf.Instruction) []bpf.Instruction {
	out := []bpf.Instruction{
		bpf.LoadAbsolute{Off: 12, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: etherIPv4, SkipTrue: 3},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: etherIPv6, SkipTrue: 1},
		bpf.RetConstant{},
		bpf.Jump{Skip: uint32(len(v4))},
	}
	return slices.Concat(out, v4, v6)
}

// toAnybody takes all IP packets.
func toAnybody() []bpf.Instruction {
	all := []bpf.Instruction{bpf.RetConstant{Val: wholePacket}}
	return families(all, all)
}

// byLength sorts prefixes so that those of the same length share a mask.
func byLength(prefixes []netip.Prefix) []netip.Prefix {
	return slices.SortedStableFunc(slices.Values(prefixes), func(a, b netip.Prefix) int { return b.Bits() - a.Bits() })
}

// match4 compares the destination in X with a prefix; A has it masked already unless
// this is the first of its length.
func match4(p netip.Prefix, first bool) (out []bpf.Instruction) {
	if first {
		out = append(out, bpf.TXA{}, bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: ^uint32(0) << (32 - p.Bits())})
	}
	a := p.Addr().As4()
	return append(out,
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32(a[:]), SkipTrue: 1},
		bpf.RetConstant{Val: wholePacket})
}

// match6 compares the destination in the scratch memory with a prefix.
func match6(p netip.Prefix) (out []bpf.Instruction) {
	a := p.Addr().As16()
	var tests [][]bpf.Instruction
	for i := 0; i*32 < p.Bits(); i++ {
		load := []bpf.Instruction{bpf.LoadScratch{Dst: bpf.RegA, N: i}}
		if left := p.Bits() - i*32; left < 32 {
			load = append(load, bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: ^uint32(0) << (32 - left)})
		}
		tests = append(tests, append(load, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32(a[i*4:])}))
	}
	for i, t := range tests {
		rest := 1 // the return
		for _, later := range tests[i+1:] {
			rest += len(later)
		}
		jump := t[len(t)-1].(bpf.JumpIf)
		jump.SkipTrue = uint8(rest)
		t[len(t)-1] = jump
		out = append(out, t...)
	}
	return append(out, bpf.RetConstant{Val: wholePacket})
}

// attach makes a program for frames that are for us the filter of a socket, in the place of
// the one before.
func attach(fd int, program []bpf.Instruction) error {
	return attachTo(fd, append(forUs(), program...))
}

func attachTo(fd int, program []bpf.Instruction) error {
	raw, err := bpf.Assemble(program)
	if err != nil {
		return fmt.Errorf("assemble filter: %w", err)
	}
	list := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		list[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(list)), Filter: &list[0]}); err != nil {
		return fmt.Errorf("attach filter of %d instructions: %w", len(list), err)
	}
	return nil
}

// attachPrefixes attaches a filter for disjoint prefixes. If the kernel doesn't take so
// many, all IP packets pass, exact is false, and who reads has to look.
func attachPrefixes(fd int, prefixes []netip.Prefix) (exact bool, err error) {
	program := toPrefixes(prefixes)
	if len(forUs())+len(program) <= maxInstructions {
		if err = attach(fd, program); !errors.Is(err, unix.ENOMEM) {
			return err == nil, err
		}
	}
	return false, attach(fd, toAnybody())
}
