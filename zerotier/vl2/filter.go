package vl2

import (
	"math/rand/v2"
	"net/netip"

	"ztgate/zerotier/identity"
)

func random32() uint32 { return rand.Uint32() }

func addrOf(t Thing) netip.Addr {
	if t.Type == ThingIPv4 {
		return netip.AddrFrom4([4]byte(t.Value[:4]))
	}
	return netip.AddrFrom16(t.Value)
}

// FilterResult says what to do with a frame.
type FilterResult uint8

const (
	FilterDrop        FilterResult = iota
	FilterAccept                   // subject to the checks of addresses
	FilterSuperAccept              // in spite of them
)

// Flags of EXT_FRAME copies (chapter 03 §4.2).
const (
	flagTeeOut, flagRedirectOut, flagWatchOut = 0x02, 0x04, 0x16
	flagTeeIn, flagRedirectIn, flagWatchIn    = 0x08, 0x0a, 0x1c
)

// Diversion is a copy or redirection that rules order: EXT_FRAME with the frame's
// MACs and ethertype and the first Length bytes of its payload.
type Diversion struct {
	To     identity.Address
	Flags  byte // of EXT_FRAME
	Length int
}

// Decision is what the rules say about a frame. It holds no pointers.
type Decision struct {
	Result FilterResult
	list   [3]Diversion // a capability's copy, the base table's copy, a redirection
	n      int
}

// Diversions lists what is to be sent besides, in order.
func (d *Decision) Diversions() []Diversion { return d.list[:d.n] }

func (d *Decision) add(to identity.Address, flags byte, length int) {
	d.list[d.n] = Diversion{To: to, Flags: flags, Length: length}
	d.n++
}

// copyFlags are the flags of EXT_FRAME in one direction.
type copyFlags struct{ tee, watch, redirect byte }

func (d *Decision) addCopy(c Copy, flags copyFlags) {
	switch {
	case c.To == 0:
	case c.Watch:
		d.add(c.To, flags.watch, c.Length)
	default:
		d.add(c.To, flags.tee, c.Length)
	}
}

// Outbound judges a frame we send (chapter 03 §6.5); the result is FilterDrop or
// FilterAccept. second marks the pass for one recipient of a multicast or unknown
// MAC, in which no copies are sent. It allocates nothing.
func Outbound(f *FrameInfo, own *NetworkConfig, other *Membership, second bool) (d Decision) {
	flags := copyFlags{flagTeeOut, flagWatchOut, flagRedirectOut}
	base := Evaluate(own.Rules, f, own, other)
	dest := base.Destination
	switch base.Verdict {
	case VerdictAccept, VerdictSuperAccept, VerdictRedirect:
		d.Result = FilterAccept
	case VerdictNoMatch:
		for _, c := range own.Capabilities {
			ev := Evaluate(c.Rules, f, own, other)
			if ev.Verdict == VerdictNoMatch || ev.Verdict == VerdictDrop {
				continue
			}
			d.Result, dest = FilterAccept, ev.Destination
			if !second {
				d.addCopy(ev.Copy, flags)
			}
			break
		}
	}
	if d.Result == FilterDrop {
		return d
	}
	if !second {
		d.addCopy(base.Copy, flags)
	}
	d.redirect(f, dest, flags)
	return d
}

func (d *Decision) redirect(f *FrameInfo, dest identity.Address, flags copyFlags) {
	if dest != f.Destination && dest != 0 {
		d.add(dest, flags.redirect, len(f.Data))
		d.Result = FilterDrop
	}
}

// Inbound judges a frame we got (chapter 03 §6.6). It allocates nothing.
func Inbound(f *FrameInfo, own *NetworkConfig, sender *Membership) (d Decision) {
	flags := copyFlags{flagTeeIn, flagWatchIn, flagRedirectIn}
	base := Evaluate(own.Rules, f, own, sender)
	dest := base.Destination
	switch base.Verdict {
	case VerdictAccept, VerdictRedirect:
		d.Result = FilterAccept
	case VerdictSuperAccept:
		d.Result = FilterSuperAccept
	case VerdictNoMatch:
		if sender == nil {
			break
		}
		for _, c := range sender.caps {
			if !sender.usable(own, TypeCapability, c.ID, c.Timestamp) {
				continue
			}
			ev := Evaluate(c.Rules, f, own, sender)
			if ev.Verdict == VerdictNoMatch || ev.Verdict == VerdictDrop {
				continue
			}
			d.Result, dest = FilterAccept, ev.Destination
			if ev.Verdict == VerdictSuperAccept {
				d.Result = FilterSuperAccept
			}
			d.addCopy(ev.Copy, flags)
			break
		}
	}
	if d.Result == FilterDrop {
		return d
	}
	d.addCopy(base.Copy, flags)
	d.redirect(f, dest, flags)
	return d
}

// Emit sends EXT_FRAME copies and redirections that rules order: data is the
// Ethernet payload, flags are those of the frame.
type Emit func(to identity.Address, flags byte, data []byte)

func (d *Decision) emit(f *FrameInfo, emit Emit) {
	for _, x := range d.Diversions() {
		emit(x.To, x.Flags, f.Data[:x.Length])
	}
}

// FilterOutbound is [Outbound] that also sends what the rules order.
func FilterOutbound(f *FrameInfo, own *NetworkConfig, other *Membership, second bool, emit Emit) bool {
	d := Outbound(f, own, other, second)
	d.emit(f, emit)
	return d.Result != FilterDrop
}

// FilterInbound is [Inbound] that also sends what the rules order.
func FilterInbound(f *FrameInfo, own *NetworkConfig, sender *Membership, emit Emit) FilterResult {
	d := Inbound(f, own, sender)
	d.emit(f, emit)
	return d.Result
}
