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

// Results.
const (
	FilterDrop        FilterResult = iota
	FilterAccept                   // subject to the checks of addresses
	FilterSuperAccept              // in spite of them
)

// Emit sends EXT_FRAME copies and redirections that rules order: data is the
// Ethernet payload, flags are those of the frame.
type Emit func(to identity.Address, flags byte, data []byte)

// Flags of EXT_FRAME copies (chapter 03 §4.2).
const (
	flagTeeOut, flagRedirectOut, flagWatchOut = 0x02, 0x04, 0x16
	flagTeeIn, flagRedirectIn, flagWatchIn    = 0x08, 0x0a, 0x1c
)

// FilterOutbound judges a frame we send (chapter 03 §6.5). second marks the pass
// for one recipient of a multicast or unknown MAC, in which no copies are sent.
func FilterOutbound(f *FrameInfo, own *NetworkConfig, other *Membership, second bool, emit Emit) bool {
	base := Evaluate(own.Rules, f, own, other)
	accepted := base.Verdict == VerdictAccept || base.Verdict == VerdictSuperAccept || base.Verdict == VerdictRedirect
	dest := base.Destination
	if base.Verdict == VerdictNoMatch {
		for _, c := range own.Capabilities {
			ev := Evaluate(c.Rules, f, own, other)
			if ev.Verdict == VerdictNoMatch || ev.Verdict == VerdictDrop {
				continue
			}
			accepted, dest = true, ev.Destination
			if !second {
				copyFrame(ev.Copy, f, flagTeeOut, flagWatchOut, emit)
			}
			break
		}
	}
	if !accepted {
		return false
	}
	if !second {
		copyFrame(base.Copy, f, flagTeeOut, flagWatchOut, emit)
	}
	if dest != f.Destination && dest != 0 {
		emit(dest, flagRedirectOut, f.Data)
		return false
	}
	return true
}

func copyFrame(c Copy, f *FrameInfo, tee, watch byte, emit Emit) {
	if c.To == 0 {
		return
	}
	flags := tee
	if c.Watch {
		flags = watch
	}
	emit(c.To, flags, f.Data[:c.Length])
}

// FilterInbound judges a frame we got (chapter 03 §6.6).
func FilterInbound(f *FrameInfo, own *NetworkConfig, sender *Membership, emit Emit) FilterResult {
	base := Evaluate(own.Rules, f, own, sender)
	res := FilterDrop
	dest := base.Destination
	switch base.Verdict {
	case VerdictAccept, VerdictRedirect:
		res = FilterAccept
	case VerdictSuperAccept:
		res = FilterSuperAccept
	case VerdictNoMatch:
		if sender != nil {
			sender.Capabilities(own, func(c *Capability) bool {
				ev := Evaluate(c.Rules, f, own, sender)
				if ev.Verdict == VerdictNoMatch || ev.Verdict == VerdictDrop {
					return true
				}
				res, dest = FilterAccept, ev.Destination
				if ev.Verdict == VerdictSuperAccept {
					res = FilterSuperAccept
				}
				copyFrame(ev.Copy, f, flagTeeIn, flagWatchIn, emit)
				return false
			})
		}
	}
	if res == FilterDrop {
		return res
	}
	copyFrame(base.Copy, f, flagTeeIn, flagWatchIn, emit)
	if dest != f.Destination && dest != 0 {
		emit(dest, flagRedirectIn, f.Data)
		return FilterDrop
	}
	return res
}
