package conformance

// knownFailures are rows that the router doesn't hold yet and why. A plain run
// skips them; -strict fails on those that are binding.
var knownFailures = map[string]string{
	"4787-REQ-7":      "an overlay route around a VPC prefix isn't reported",
	"4443-3.4":        "next header 253 to the router is dropped without 4/1",
	"8200-4":          "next header 253 is dropped in transit",
	"LF-26":           "the router's own ports answer RST",
	"L-LOSS-COLLIDED": "a replaced port isn't kept free for its owner over a restart",
}
