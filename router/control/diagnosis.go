package control

import (
	"fmt"
	"net/netip"

	"ztgate/router/fault"
)

// LinkState is what was found of a link of the way to a target.
type LinkState string

// States of a link.
const (
	LinkOK         LinkState = "ok"
	LinkDegraded   LinkState = "degraded" // it holds, but something is wrong
	LinkBroken     LinkState = "broken"
	LinkNotReached LinkState = "not_reached" // a link before it is broken
	LinkSkipped    LinkState = "skipped"     // it can't be tried
)

// Link is one link of the way to a target.
type Link struct {
	Name   string    `json:"name"`
	Target string    `json:"target,omitempty"` // empty: of the ways to all of them
	State  LinkState `json:"state"`
	Detail string    `json:"detail,omitempty"`
	Remedy string    `json:"remedy,omitempty"`
}

// DiagnosisRequest asks for a walk along the ways to targets.
type DiagnosisRequest struct {
	Targets []string   `json:"targets,omitempty"` // as in the configuration; none = those of it
	Client  netip.Addr `json:"client,omitzero"`   // whose way it is; invalid = some host of the VPC
}

// Diagnosis is what a walk found.
type Diagnosis struct {
	Schema  int    `json:"schema"`
	Running bool   `json:"running"` // the gateway was asked; else the host was looked at
	Links   []Link `json:"links"`
}

// Broken returns the first broken link, nil if all hold.
func (d Diagnosis) Broken() *Link {
	for i := range d.Links {
		if d.Links[i].State == LinkBroken {
			return &d.Links[i]
		}
	}
	return nil
}

// Err returns nil if all links hold.
func (d Diagnosis) Err() error {
	l := d.Broken()
	if l == nil {
		return nil
	}
	name := l.Name
	if l.Target != "" {
		name += " of " + l.Target
	}
	text := name + ": " + l.Detail
	if l.Remedy != "" {
		text += ": " + l.Remedy
	}
	if l.Name == LinkGateway {
		return &fault.Error{Kind: fault.KindNotRunning, Err: fmt.Errorf("%s", text)}
	}
	return fault.NotReady("%s", text)
}

// LinkGateway is the name of the link that is the running process.
const LinkGateway = "gateway"
