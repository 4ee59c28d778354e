package portmap

import (
	"bufio"
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/huin/goupnp"
	"github.com/huin/goupnp/dcps/internetgateway2"
	"github.com/huin/goupnp/soap"
)

// Limits and times of UPnP.
const (
	ssdpPort       = 1900
	searchFor      = 1500 * time.Millisecond
	searchAgain    = 500 * time.Millisecond
	maxSearchReads = 128  // datagrams, whoever sent them
	maxSearchSize  = 2048 // of a datagram
	httpLimit      = 3 * time.Second
	maxBody        = 64 << 10
	maxHeader      = 8 << 10
	maxServices    = 4
	upnpTries      = 10 // external ports from the wanted one on
	deviceType     = "urn:schemas-upnp-org:device:InternetGatewayDevice:"
)

// Errors of the UPnP Internet Gateway Device.
const (
	upnpConflict      = 718 // the external port is another host's
	upnpPermanentOnly = 725 // no leases
)

var ssdpGroup = netip.AddrFrom4([4]byte{239, 255, 255, 250})

// upnp speaks to an Internet Gateway Device.
type upnp struct {
	Gateway
	description string
	device      igd // nil until found
}

// igd is what the kinds of connection services have in common.
type igd interface {
	GetExternalIPAddressCtx(ctx context.Context) (string, error)
	AddPortMappingCtx(ctx context.Context, remoteHost string, externalPort uint16, protocol string, internalPort uint16,
		internalClient string, enabled bool, description string, leaseSeconds uint32) error
	DeletePortMappingCtx(ctx context.Context, remoteHost string, externalPort uint16, protocol string) error
}

func (*upnp) name() string { return "upnp" }

func (u *upnp) request(ctx context.Context, own func() (uint16, error), want uint16) (_ netip.AddrPort, _ time.Duration, err error) {
	defer func() {
		if err != nil {
			u.device = nil // look for it again next time
		}
	}()
	external, err := u.find(ctx)
	if err != nil {
		return netip.AddrPort{}, 0, err
	}
	port, err := own()
	if err != nil {
		return netip.AddrPort{}, 0, err
	}
	if want == 0 {
		want = port
	}
	asked, text := lease, fmt.Sprintf("%s@%d", u.description, port)
	for range upnpTries {
		err = u.device.AddPortMappingCtx(ctx, "", want, "UDP", port, u.Local.String(), true, text, uint32(asked/time.Second))
		if code := upnpCode(err); code == upnpPermanentOnly && asked != 0 {
			asked = 0
			err = u.device.AddPortMappingCtx(ctx, "", want, "UDP", port, u.Local.String(), true, text, 0)
		}
		if upnpCode(err) != upnpConflict || want == 65535 {
			break
		}
		want++
	}
	if err != nil {
		return netip.AddrPort{}, 0, upnpError(err)
	}
	// The device doesn't say how long it keeps the mapping: renewed as if it were what
	// was asked for.
	return netip.AddrPortFrom(external, want), lease, nil
}

func (u *upnp) release(ctx context.Context, m Mapping) error {
	if u.device == nil {
		if _, err := u.find(ctx); err != nil {
			return err
		}
	}
	return u.device.DeletePortMappingCtx(ctx, "", m.External.Port(), "UDP")
}

// find makes sure that device is known and returns its external address.
func (u *upnp) find(ctx context.Context) (netip.Addr, error) {
	if u.device != nil {
		return externalAddress(ctx, u.device)
	}
	location, err := u.search(ctx)
	if err != nil {
		return netip.Addr{}, err
	}
	c := newHTTPClient(u.Gateway)
	body, err := get(ctx, c, location)
	if err != nil {
		return netip.Addr{}, failed(BadAnswer, "device description: %w", err)
	}
	services, err := parseDevice(body, location, u.Addr)
	if err != nil {
		return netip.Addr{}, err
	}
	for _, s := range services {
		device := newIGD(s, c)
		var a netip.Addr
		if a, err = externalAddress(ctx, device); err == nil {
			u.device = device
			return a, nil
		}
	}
	return netip.Addr{}, err
}

func externalAddress(ctx context.Context, d igd) (netip.Addr, error) {
	text, err := d.GetExternalIPAddressCtx(ctx)
	if err != nil {
		return netip.Addr{}, upnpError(err)
	}
	a, err := netip.ParseAddr(text)
	if err != nil {
		return netip.Addr{}, failed(BadAnswer, "external address: %w", err)
	}
	if !public(a) {
		return a, failed(NotPublic, "external address %v is not public", a)
	}
	return a, nil
}

// search finds the description of the router. Other hosts' answers don't count.
func (u *upnp) search(ctx context.Context) (*url.URL, error) {
	ctx, cancel := context.WithTimeout(ctx, searchFor)
	defer cancel()
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(u.Local, 0)))
	if err != nil {
		return nil, failed(NoAnswer, "%w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	reads := 0
	for ctx.Err() == nil {
		for _, version := range []string{"1", "2"} {
			request := fmt.Appendf(nil, "M-SEARCH * HTTP/1.1\r\nHOST: %v:%d\r\nMAN: \"ssdp:discover\"\r\nMX: 1\r\nST: %s%s\r\n\r\n", ssdpGroup, ssdpPort, deviceType, version)
			for _, to := range []netip.Addr{ssdpGroup, u.Addr} {
				_, _ = conn.WriteToUDPAddrPort(request, netip.AddrPortFrom(to, ssdpPort)) // one way is enough
			}
		}
		if err := conn.SetReadDeadline(time.Now().Add(searchAgain)); err != nil {
			return nil, failed(NoAnswer, "%w", err)
		}
		for ; reads < maxSearchReads; reads++ {
			var buf [maxSearchSize]byte
			n, from, err := conn.ReadFromUDPAddrPort(buf[:])
			if err != nil {
				break
			}
			if from.Addr().Unmap() != u.Addr {
				continue
			}
			if location := parseSearch(buf[:n], u.Addr); location != nil {
				return location, nil
			}
		}
		if reads == maxSearchReads {
			break
		}
	}
	return nil, failed(NoAnswer, "no answer")
}

// parseSearch reads an answer to a search and returns where the router's description
// is, nil if it is not on the router itself or the answer is about something else.
func parseSearch(b []byte, router netip.Addr) *url.URL {
	r, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(b)), nil)
	if err != nil {
		return nil
	}
	_ = r.Body.Close()
	if r.StatusCode != http.StatusOK || !strings.HasPrefix(r.Header.Get("ST"), deviceType) {
		return nil
	}
	location, err := url.Parse(r.Header.Get("LOCATION"))
	if err != nil || !leadsTo(location, router) {
		return nil
	}
	return location
}

// leadsTo reports whether a URL is one of the router itself.
func leadsTo(u *url.URL, router netip.Addr) bool {
	a, err := netip.ParseAddr(u.Hostname())
	return err == nil && a == router && u.Scheme == "http" && u.User == nil
}

// parseDevice reads a device description and returns the services that can map ports,
// the best kind first.
func parseDevice(body []byte, location *url.URL, router netip.Addr) ([]*goupnp.Service, error) {
	root := new(goupnp.RootDevice)
	d := xml.NewDecoder(bytes.NewReader(body))
	d.DefaultSpace = goupnp.DeviceXMLNamespace
	if err := d.Decode(root); err != nil {
		return nil, failed(BadAnswer, "device description: %w", err)
	}
	base := location
	if b, err := url.Parse(root.URLBaseStr); err == nil && leadsTo(b, router) {
		base = b
	}
	root.SetURLBase(base)
	var out []*goupnp.Service
	elsewhere := false
	for _, kind := range serviceTypes {
		for _, s := range root.Device.FindService(kind) {
			if !s.ControlURL.Ok || !leadsTo(&s.ControlURL.URL, router) {
				elsewhere = true
			} else if len(out) < maxServices {
				out = append(out, s)
			}
		}
	}
	if len(out) == 0 && elsewhere {
		return nil, failed(BadAnswer, "device description leads to another host")
	} else if len(out) == 0 {
		return nil, failed(Refused, "the device maps no ports")
	}
	return out, nil
}

var serviceTypes = []string{internetgateway2.URN_WANIPConnection_2, internetgateway2.URN_WANIPConnection_1, internetgateway2.URN_WANPPPConnection_1}

func newIGD(s *goupnp.Service, c *http.Client) igd {
	sc := goupnp.ServiceClient{SOAPClient: s.NewSOAPClient(), Service: s}
	sc.SOAPClient.HTTPClient = *c
	switch s.ServiceType {
	case internetgateway2.URN_WANIPConnection_2:
		return &internetgateway2.WANIPConnection2{ServiceClient: sc}
	case internetgateway2.URN_WANIPConnection_1:
		return &internetgateway2.WANIPConnection1{ServiceClient: sc}
	}
	return &internetgateway2.WANPPPConnection1{ServiceClient: sc}
}

// upnpCode returns the device's error code, 0 if it gave none.
func upnpCode(err error) int {
	var f *soap.SOAPFaultError
	if errors.As(err, &f) {
		return f.Detail.UPnPError.Errorcode
	}
	return 0
}

func upnpError(err error) error {
	var f *soap.SOAPFaultError
	if errors.As(err, &f) {
		return failed(Refused, "error %d %q", f.Detail.UPnPError.Errorcode, f.Detail.UPnPError.ErrorDescription)
	}
	return failed(BadAnswer, "%w", err)
}

var (
	errRedirect = errors.New("redirect refused")
	errHost     = errors.New("other hosts are refused")
	errTooLarge = fmt.Errorf("answer is larger than %d bytes", maxBody)
)

// newHTTPClient makes a client that talks to the router only, and reads no more than
// maxBody of an answer.
func newHTTPClient(g Gateway) *http.Client {
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(g.Local, 0))}
	return &http.Client{
		Timeout:       httpLimit,
		CheckRedirect: func(*http.Request, []*http.Request) error { return errRedirect },
		Transport: &guard{g.Addr, &http.Transport{
			DialContext:            d.DialContext,
			DisableKeepAlives:      true,
			DisableCompression:     true,
			MaxResponseHeaderBytes: maxHeader,
		}},
	}
}

type guard struct {
	router netip.Addr
	next   http.RoundTripper
}

func (g *guard) RoundTrip(r *http.Request) (*http.Response, error) {
	if !leadsTo(r.URL, g.router) {
		return nil, errHost
	}
	resp, err := g.next.RoundTrip(r)
	if err == nil {
		resp.Body = &limited{resp.Body, maxBody}
	}
	return resp, err
}

// limited is a body that fails after a number of bytes.
type limited struct {
	io.ReadCloser
	left int
}

func (l *limited) Read(b []byte) (int, error) {
	if l.left == 0 {
		return 0, errTooLarge
	}
	n, err := l.ReadCloser.Read(b[:min(len(b), l.left)])
	l.left -= n
	return n, err
}

func get(ctx context.Context, c *http.Client, u *url.URL) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %d", resp.StatusCode)
	}
	return io.ReadAll(resp.Body)
}
