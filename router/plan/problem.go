package plan

import (
	"errors"
	"fmt"
	"net/netip"

	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

// Problem is something that isn't used, or doesn't work, as it was asked for.
type Problem struct {
	Network ztnode.NetworkID // 0 = of the configuration
	Prefix  netip.Prefix     // that it is about; invalid = none
	Thing   string           // as in "managed route 172.31.0.0/28"
	Refused bool             // it is left out; else it is used and can't work as things are
	// Declined says that it is refused because nobody asked for it, which is no fault.
	Declined bool
	Fatal    bool   // the configuration contradicts itself and isn't put into force
	Reason   string // a clause, as in "it lies inside the VPC's own 172.31.0.0/16"
	Remedy   string // a request to the operator

	gateway bool // it is none for a member
}

// String returns one sentence.
func (p Problem) String() string {
	s := p.Thing
	if p.Refused {
		s += " is not used"
	}
	s += ": " + p.Reason
	if p.Remedy != "" {
		s += "; " + p.Remedy
	}
	return s
}

// objection is a reason against something, and what to do.
type objection struct {
	reason, remedy string
	fatal          bool
	declined       bool
}

func object(remedy, format string, args ...any) *objection {
	return &objection{reason: fmt.Sprintf(format, args...), remedy: remedy}
}

// decline objects to what is no fault of anybody.
func decline(remedy, format string, args ...any) *objection {
	o := object(remedy, format, args...)
	o.declined = true
	return o
}

// fatally marks an objection that the configuration alone is to blame for.
func fatally(o *objection) *objection {
	if o != nil {
		o.fatal = true
	}
	return o
}

// refuse notes that something is not used.
func (b *builder) refuse(id ztnode.NetworkID, p netip.Prefix, thing string, why *objection) {
	b.out.Problems = append(b.out.Problems, Problem{Network: id, Prefix: p.Masked(), Thing: thing, Refused: true, Fatal: why.fatal, Declined: why.declined, Reason: why.reason, Remedy: why.remedy})
}

// warn notes that something can't work as things are.
func (b *builder) warn(thing string, why *objection) {
	b.out.Problems = append(b.out.Problems, Problem{Thing: thing, Reason: why.reason, Remedy: why.remedy})
}

// fatalError returns the fatal ones of problems as an error of usage.
func fatalError(list []Problem) error {
	var errs []error
	for _, p := range list {
		if p.Fatal {
			errs = append(errs, fault.Usagef("%s: %s; %s", p.Thing, p.Reason, p.Remedy))
		}
	}
	return fault.Usage(errors.Join(errs...))
}
