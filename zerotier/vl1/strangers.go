package vl1

import (
	"net/netip"
	"time"

	"ztgate/internal/rate"
	"ztgate/zerotier/packet"
)

// Limits of what strangers do, besides the time that it may take in all (package
// budget).
const (
	networkEvery = 2 * time.Second // key agreements of one source network
	networkBurst = 8
	openEvery    = 20 * time.Millisecond // sealed HELLOs of one source network opened, also of peers that moved
	openBurst    = 256
	agreeEvery   = time.Millisecond // so that a worker isn't held up by many at once
	agreeBurst   = 500
	inlineEvery  = time.Second
	inlineBurst  = 16
	strangeEvery = 50 * time.Millisecond // questions
	strangeBurst = 50

	answerEvery   = 250 * time.Millisecond // OK(HELLO) to one address
	answerBurst   = 20
	answerSources = 4096 // told apart
)

// strangers bounds what those cost us who have proved nothing yet.
type strangers struct {
	networks [packet.SourceBuckets]rate.Bucket // key agreements by source network
	sealed   [packet.SourceBuckets]rate.Bucket // HELLOs opened by source network
	agreed   rate.Bucket                       // key agreements
	inline   rate.Bucket                       // identity checks on a receiving worker
	checking bool                              // one runs in the background
	asked    rate.Bucket                       // WHOIS they cause
	answers  *rate.Table[netip.Addr]           // OK(HELLO)
}

// mayAgree limits key agreements per source network and in all.
func (s *strangers) mayAgree(t int64, source netip.Addr) bool {
	return s.networks[packet.SourceBucket(source)].Take(t, networkEvery, networkBurst) && s.agreed.Take(t, agreeEvery, agreeBurst)
}

// mayOpen limits sealed HELLOs that are opened per source network and in all.
func (s *strangers) mayOpen(t int64, source netip.Addr) bool {
	return s.sealed[packet.SourceBucket(source)].Take(t, openEvery, openBurst) && s.agreed.Take(t, agreeEvery, agreeBurst)
}

// mayAsk limits the questions that strangers cause.
func (s *strangers) mayAsk(t int64) bool { return s.asked.Take(t, strangeEvery, strangeBurst) }

// mayAnswer limits OK(HELLO) per address (chapter 02 §9).
func (s *strangers) mayAnswer(t int64, source netip.Addr) bool {
	return s.answers.Of(source).Take(t, 1, answerEvery, answerBurst)
}

// checking is where an identity is checked.
type checking uint8

const (
	checkRefused checking = iota
	checkHere
	checkBackground // until checked
)

// check decides where an identity is checked. background says that it may be
// done there.
func (s *strangers) check(t int64, background, room bool) checking {
	here := !background || s.inline.Take(t, inlineEvery, inlineBurst)
	if !here && (s.checking || !room) {
		return checkRefused
	}
	if here {
		return checkHere
	}
	s.checking = true
	return checkBackground
}

// checked ends a check in the background.
func (s *strangers) checked() { s.checking = false }
