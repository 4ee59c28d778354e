package resolver

import "github.com/prometheus/client_golang/prometheus"

// result is what became of a question.
type result string

const (
	resultZone       result = "zone"       // answered from the zone
	resultForwarded  result = "forwarded"  // answered by others
	resultUnanswered result = "unanswered" // no server has answered
	resultUnusable   result = "unusable"   // the answer has an address that is no host's
	resultNobody     result = "nobody"     // nobody is asked for the name
	resultKind       result = "kind"       // a type, class or operation that isn't answered
	resultMalformed  result = "malformed"  // no question
	resultSource     result = "source"     // from an address that may not ask
	resultRate       result = "rate"       // too many of the client
	resultShare      result = "share"      // too many at a time, of the client or in all
	resultEvicted    result = "evicted"    // gave way to another client's
)

var results = [...]result{resultZone, resultForwarded, resultUnanswered, resultUnusable, resultNobody, resultKind, resultMalformed,
	resultSource, resultRate, resultShare, resultEvicted}

// Results lists what can become of a question.
func Results() (out []string) {
	for _, r := range results {
		out = append(out, string(r))
	}
	return out
}

type counters struct{ queries *prometheus.CounterVec }

func (c *counters) register(reg prometheus.Registerer, r *Resolver) {
	c.queries = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "ztgate_dns_queries_total",
		Help: "Questions for names that clients asked, by what became of them."}, []string{"protocol", "result"})
	for _, proto := range []string{"udp", "tcp"} {
		for _, x := range results {
			c.queries.WithLabelValues(proto, string(x))
		}
	}
	reg.MustRegister(c.queries, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "ztgate_dns_forwarded",
		Help: "Questions for names that are with other servers now."}, func() float64 { return float64(r.flights.taken()) }))
}

func (c *counters) query(proto string, x result) { c.queries.WithLabelValues(proto, string(x)).Inc() }
