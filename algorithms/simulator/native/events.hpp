// The event engine: what all ranks do, in the order of time, on links that they share.
//
// Each lane of a rank walks its program. Where it meets something that others may want, too (a link, a core), it
// waits until it is the earliest of all; so whatever is shared is served in the order in which it was asked for.
// Ranks at the same time are served in an order that rotating the ranks does not change.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "program.hpp"

namespace abccl::simulator {

// What messages between ranks of one level cost, in seconds and seconds per byte. Where `links` is 0 they share none.
struct Level {
    int64_t unit;  // ranks; 0 for all
    double alpha, overhead, beta;
    int64_t per;      // ranks that share the links
    int32_t links;    // into so many ranks, and as many out of them
    double per_byte;  // how long a byte keeps a link busy
    bool through;     // messages of higher levels pass these links, too
};

// What a rank costs, likewise.
struct Costs {
    double launch, send, receive, copy, fold, lent, lent_fold;
    bool lends;
    int32_t slots;       // room for messages in each channel; 0 for any number
    int32_t processors;  // lanes that a rank serves at once; 0 for all
    int64_t crowd;       // ranks that share `cores`; 0 if each has its own
    int32_t cores;
};

struct Load {
    double block;  // bytes of a block in a segment
    int64_t segments;
    int32_t lanes;
    int64_t ties;  // ranks that are as many apart are served alike
};

struct Slice {
    enum Kind : uint8_t { send, wait, receive, fold, copy, message };

    int32_t rank, lane;
    int64_t segment;
    int32_t peer;
    Kind kind;
    double start, end, bytes;
};

class Engine {
  public:
    // Throws std::invalid_argument where the numbers make no sense.
    Engine(Symmetry symmetry, std::vector<Level> levels, Costs costs, Load load, bool in_place, bool record);

    // The code of the next representative, in their order. Throws std::invalid_argument where it is none.
    void add(const int32_t* code, size_t count);

    // Goes on for so many events at least, until nothing can happen any more; returns whether that is so.
    bool run(int64_t events);

    // Once nothing can happen: what is wrong with the schedule; "" if all are through.
    std::string problem() const;

    double seconds() const;
    int64_t events() const { return events_; }
    int64_t messages() const { return messages_; }
    double progress() const;  // the part of all operations that is done
    const std::vector<Slice>& slices() const { return slices_; }
    std::vector<double> ends() const;           // of each representative
    std::vector<double> busiest_links() const;  // of each level: for how long its busiest link was
    double busiest_rank() const;

  private:
    static constexpr uint32_t none = ~0U;

    struct Actor {
        int32_t rank, lane;
        int64_t segment;
        uint32_t position = 0;
        bool begun = false;  // the first part of a post or a take is done
        double clock = 0, busy = 0;
        std::vector<bool> registers;  // whether the message there is lent
        std::vector<uint32_t> taken;  // the channels that they came from
    };

    // A time in a queue, of a message that is there or of a slot that was given back.
    struct Entry {
        double time;
        uint32_t next;
        int32_t blocks;
        bool lent;
    };

    struct Queue {
        uint32_t first = none, last = none;
        bool empty() const { return first == none; }
    };

    struct Channel {
        Queue arrived, released;
        uint32_t sender = none, receiver = none;  // who waits here
        int64_t sent = 0;
        double latest = 0;  // messages stay in order
    };

    struct Message {
        uint32_t channel;
        int32_t sender, receiver, lane;
        int64_t segment;
        int32_t peer;
        int32_t blocks;
        int16_t level;
        bool lent;
        double bytes, start;
    };

    // Somebody goes on, or a message's head arrives. At the same time the older segment is first, then who is less far
    // in its program: so messages of a channel stay in order.
    struct Event {
        double time;
        uint64_t segment, order;
        uint32_t index;
        bool is_message;

        bool operator<(const Event& other) const {
            if (time != other.time) return time < other.time;
            if (segment != other.segment) return segment < other.segment;
            if (order != other.order) return order < other.order;
            if (is_message != other.is_message) return is_message;
            return index < other.index;
        }
    };

    // The links of a level, in one direction.
    struct Links {
        std::vector<double> free, busy;
    };

    void prepare();
    void resume(uint32_t actor);
    bool resume_post(Actor& actor, uint32_t index, const Operation& operation);
    bool resume_take(Actor& actor, uint32_t index, const Operation& operation);
    bool work(Actor& actor, uint32_t index, Slice::Kind kind, double seconds, double bytes, int32_t peer);
    bool is_earliest(const Actor& actor, uint32_t index) const;
    void wait_until(Actor& actor, double time, int32_t peer);
    void post(Actor& actor, const Operation& operation);
    void arrive(uint32_t message, double time);
    void release(Actor& actor);
    void wake(uint32_t& waiting, double time);
    double pass(std::vector<Links>& links, int64_t rank, int16_t level, double time, double bytes);
    Event event_of(const Actor& actor, uint32_t index) const;
    void push(const Event& event);
    Event pop();
    void put(Queue& queue, const Entry& entry);
    Entry take(Queue& queue);
    uint32_t channel(const Actor& actor, const Operation& operation) const;
    void keep(const Actor& actor, Slice::Kind kind, double start, double bytes, int32_t peer);

    Symmetry symmetry_;
    std::vector<Level> levels_;
    Costs costs_;
    Load load_;
    bool record_, crowded_, prepared_ = false;
    Reader reader_;
    std::vector<Program> programs_;
    std::vector<Actor> actors_;
    std::vector<Channel> channels_;
    std::vector<Entry> entries_;
    std::vector<uint32_t> free_entries_;
    std::vector<Message> in_flight_;
    std::vector<uint32_t> free_messages_;
    std::vector<Event> heap_;
    std::vector<Links> out_, in_;
    std::vector<char> has_links_;   // of each level: whether its messages pass any link
    std::vector<double> per_byte_;  // of each level: of its messages, on all of their way
    std::vector<double> processors_, cores_;
    std::vector<Slice> slices_;
    std::string wrong_;
    int64_t events_ = 0, messages_ = 0, done_ = 0;
};

}  // namespace abccl::simulator
