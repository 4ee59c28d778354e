package control

import (
	"net/netip"
	"time"
)

// DNS is the name server for clients.
type DNS struct {
	Listen    []DNSListen `json:"listen"`
	Zone      string      `json:"zone"`
	Hosts     int         `json:"hosts"` // in the zone
	Domains   []DNSDomain `json:"domains,omitempty"`
	Forwarded int         `json:"forwarded"`        // questions that are with other servers now
	Unused    []string    `json:"unused,omitempty"` // what networks offer and isn't used, and names that nobody has
}

// DNSListen is an address at which clients ask.
type DNSListen struct {
	Address netip.AddrPort `json:"address"`
	Error   string         `json:"error,omitempty"` // why nobody is answered there
}

// DNSDomain is what other servers are asked for.
type DNSDomain struct {
	Domain     string           `json:"domain"`            // "" = everything else
	Network    string           `json:"network,omitempty"` // whose name servers they are; "" = configured ones
	Servers    []netip.AddrPort `json:"servers"`
	LastAnswer time.Time        `json:"lastAnswer,omitzero"`
	Unanswered int              `json:"unanswered,omitempty"` // questions since
	Error      string           `json:"error,omitempty"`
}

// ResolveRequest asks what a client would be told of a name.
type ResolveRequest struct {
	Name string `json:"name"` // or an address
	Type string `json:"type,omitempty"`
}

// Resolved is the answer.
type Resolved struct {
	Schema  int              `json:"schema"`
	Name    string           `json:"name"`
	Type    string           `json:"type"`
	From    string           `json:"from"`              // who says so
	Servers []netip.AddrPort `json:"servers,omitempty"` // of those
	Code    string           `json:"code"`              // as NOERROR or NXDOMAIN
	Records []DNSRecord      `json:"records,omitempty"`
	Off     bool             `json:"off,omitempty"` // clients aren't answered at all: dns.listen is empty
}

// DNSRecord is a record of an answer.
type DNSRecord struct {
	Name  string `json:"name"`
	Type  string `json:"type"`
	TTL   uint32 `json:"ttl"`
	Value string `json:"value"`
}
